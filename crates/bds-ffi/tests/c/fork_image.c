/* A fork with requests in flight: the child ends as any program does, the parent's requests complete,
 * and its image is what it wrote. Fork and exec pass no descriptor of the library on. */
#include <dirent.h>
#include <sys/wait.h>

#include "check.h"

#define ROUNDS 10
#define BATCH 16
#define BLOCK 4096

static char blocks[BATCH][BLOCK];

/* Open descriptors beside the three standard ones and the one that reads the list. */
static int descriptors(void) {
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;
    int count = 0;
    CHECK(dir != NULL);
    while ((entry = readdir(dir)) != NULL)
        count += entry->d_name[0] != '.' && atoi(entry->d_name) > 2 &&
                 atoi(entry->d_name) != dirfd(dir);
    closedir(dir);
    return count;
}

static int exit_status(pid_t child) {
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void round_of(bds_queue queue, bds_backend backend, int number) {
    bds_request requests[BATCH];
    bds_completion done[BATCH];
    pid_t child;
    memset(requests, 0, sizeof requests);
    for (int i = 0; i < BATCH; i++) {
        memset(blocks[i], number + 1, BLOCK);
        requests[i].opcode = BDS_OP_WRITE;
        requests[i].backend = backend;
        requests[i].offset = (uint64_t)(number * BATCH + i) * 2 * BLOCK;
        requests[i].bytes = BLOCK;
        requests[i].buffer = blocks[i];
    }
    IS(BATCH, bds_queue_submit(queue, requests, BATCH));
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        /* With everything that runs at exit. */
        exit(bds_flush(backend) == BDS_ERR_FORKED ? 0 : 1);
    }
    CHECK(exit_status(child) == 0);
    IS(BATCH, bds_queue_wait(queue, done, BATCH, BATCH, -1));
    for (int i = 0; i < BATCH; i++)
        OK((int)done[i].status);
}

int main(int argc, char **argv) {
    char path[512], count[16], bytes[BLOCK], *json;
    bds_context context;
    bds_node node;
    bds_backend backend;
    bds_queue queue;
    pid_t child;
    if (argc == 2) /* after exec: as many as there were before the library was used */
        return descriptors() == atoi(argv[1]) ? 0 : 1;
    snprintf(count, sizeof count, "%d", descriptors());

    context = new_context();
    in_dir(path, sizeof path, "disk.qcow2");
    OK(bds_image_create(context, path, "qcow2", "size=4M"));
    OK(bds_node_open_path(context, path, "qcow2", 0, &node));
    backend = new_writer(node);
    OK(bds_queue_create(context, NULL, &queue));
    CHECK(bds_queue_fd(queue) >= 0 && bds_context_event_fd(context) >= 0);
    for (int number = 0; number < ROUNDS; number++)
        round_of(queue, backend, number);

    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        execl("/proc/self/exe", "fork_image", count, (char *)NULL);
        _exit(2);
    }
    CHECK(exit_status(child) == 0);

    OK(bds_queue_unref(queue));
    OK(bds_backend_unref(backend));
    OK(bds_node_close(node, NULL));
    OK(bds_node_unref(node));
    OK(bds_node_open_path(context, path, "qcow2", 0, &node));
    backend = new_writer(node);
    OK(bds_image_check(backend, &json));
    CHECK(has(json, "\"check-errors\":0") && strstr(bds_error_message(), "corrupt") == NULL);
    for (int i = 0; i < ROUNDS * BATCH; i++) {
        OK(bds_pread(backend, bytes, BLOCK, (uint64_t)i * 2 * BLOCK, 0));
        CHECK(bytes[0] == i / BATCH + 1 && bytes[BLOCK - 1] == i / BATCH + 1);
    }
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
