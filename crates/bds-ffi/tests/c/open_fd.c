/* A descriptor of the program is opened by its name in /proc: also of a file that has none. */
#include <fcntl.h>

#include "check.h"

int main(void) {
    char path[512], name[64], data[4] = {0};
    bds_context context = new_context();
    bds_node node;
    bds_backend backend;
    int fd;

    in_dir(path, sizeof path, "disk.raw");
    fd = open(path, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && ftruncate(fd, 1 << 20) == 0 && pwrite(fd, "data", 4, 4096) == 4);
    CHECK(unlink(path) == 0);
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    OK(bds_node_open_path(context, name, "raw", 0, &node));
    backend = new_writer(node);
    OK(bds_pread(backend, data, 4, 4096, 0));
    CHECK(memcmp(data, "data", 4) == 0);
    OK(bds_pwrite(backend, "more", 4, 8192, 0));
    (void)bds_backend_unref(backend);
    OK(bds_node_close(node, NULL));
    OK(bds_node_unref(node));
    CHECK(pread(fd, data, 4, 8192) == 4 && memcmp(data, "more", 4) == 0);
    CHECK(close(fd) == 0);
    OK(bds_context_unref(context));
    return 0;
}
