/* No descriptor of the library survives an exec. */
#include <dirent.h>
#include <fcntl.h>
#include <sys/wait.h>

#include "check.h"

static int leaked(void) {
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;
    int count = 0;
    while ((entry = readdir(dir)) != NULL) {
        int fd = atoi(entry->d_name);
        if (fd > 2 && fd != dirfd(dir) && !(fcntl(fd, F_GETFD) & FD_CLOEXEC))
            count++;
    }
    closedir(dir);
    return count;
}

int main(void) {
    char path[512];
    int before = leaked();
    bds_context context = new_context();
    bds_iothread thread;
    bds_queue queue;
    bds_node node;
    in_dir(path, sizeof path, "disk.raw");
    OK(bds_image_create(context, path, "raw", "size=1M"));
    OK(bds_node_open_path(context, path, "raw", 0, &node));
    OK(bds_iothread_create(context, "io0", &thread));
    OK(bds_queue_create(context, NULL, &queue));
    CHECK(bds_queue_fd(queue) >= 0 && bds_context_event_fd(context) >= 0);
    CHECK(leaked() == before);
    OK(bds_queue_unref(queue));
    OK(bds_iothread_unref(thread));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
