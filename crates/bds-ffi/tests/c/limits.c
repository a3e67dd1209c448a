/* A process without descriptors, threads or address space left: calls return codes, and what was
 * made before goes on. Only where Rust's own allocator finds no memory does the process abort. */
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "check.h"

#define MEBIBYTE ((rlim_t)1 << 20)

/* Makes one of everything; every result is a code. */
static void make_everything(const char *path) {
    bds_context context;
    bds_node node = {0};
    bds_backend backend = {0};
    bds_iothread thread = {0};
    bds_queue queue = {0};
    char byte = 1, *json;
    if (bds_context_create(NULL, &context) < 0)
        return;
    if (bds_node_open_path(context, path, "qcow2", 0, &node) >= 0 &&
        bds_backend_create_on(node, NULL, &backend) >= 0)
        (void)!bds_pread(backend, &byte, 1, 0, 0);
    (void)!bds_iothread_create(context, "limits", &thread);
    if (bds_queue_create(context, NULL, &queue) >= 0)
        (void)bds_queue_fd(queue);
    (void)bds_context_event_fd(context);
    if (bds_query(context, "nodes", &json) >= 0)
        bds_free(json);
    (void)bds_queue_unref_p(&queue);
    (void)bds_iothread_unref_p(&thread);
    (void)bds_backend_unref_p(&backend);
    (void)bds_node_unref_p(&node);
    (void)bds_context_unref(context);
}

static void limit(int what, rlim_t value) {
    struct rlimit limit;
    CHECK(getrlimit((__rlimit_resource_t)what, &limit) == 0);
    limit.rlim_cur = value;
    CHECK(setrlimit((__rlimit_resource_t)what, &limit) == 0);
}

/* How a child ended in which `what` is limited: 0, or the signal. */
static int child(int what, rlim_t value, const char *path) {
    int status;
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(60);
        limit(what, value);
        make_everything(path);
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

/* The image, made by a child: this process forks before it uses the library. */
static void make_image(const char *path) {
    int status;
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        bds_context context = new_context();
        OK(bds_image_create(context, path, "qcow2", "size=1M"));
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

#ifndef NO_ADDRESS_LIMIT /* sanitizers and Valgrind reserve terabytes */
static rlim_t address_space(void) {
    unsigned long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%lu", &pages) == 1);
    fclose(file);
    return (rlim_t)pages * 4096;
}
#endif

int main(void) {
    char path[512];
    bds_context context;
    bds_node node;
    bds_backend backend;
    bds_queue queue;
    char byte = 1;
    in_dir(path, sizeof path, "disk.qcow2");
    make_image(path);
    for (rlim_t descriptors = 3; descriptors < 24; descriptors++)
        CHECK(child(RLIMIT_NOFILE, descriptors, path) == 0);
#ifndef NO_ADDRESS_LIMIT
    for (rlim_t more = 0; more < 24; more += 2) {
        int signal = child(RLIMIT_AS, address_space() + more * MEBIBYTE, path);
        CHECK(signal == 0 || signal == SIGABRT);
    }
#endif

    /* What exists goes on. */
    context = new_context();
    OK(bds_node_open_path(context, path, "qcow2", 0, &node));
    backend = new_writer(node);
    OK(bds_queue_create(context, NULL, &queue));
    limit(RLIMIT_NOFILE, 3);
    IS(-EMFILE, bds_queue_fd(queue));
    CHECK(bds_error_status() == -EMFILE);
    OK(bds_pwrite(backend, &byte, 1, 0, BDS_REQ_FUA));
    OK(bds_flush(backend));
#ifndef NO_ADDRESS_LIMIT /* AddressSanitizer ends the process */
    {
        void *place;
        IS(-ENOMEM, bds_buffer_alloc((size_t)1 << 62, 4096, &place));
    }
#endif
    OK(bds_queue_unref(queue));
    OK(bds_backend_unref(backend));
    OK(bds_node_close(node, NULL));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    limit(RLIMIT_NOFILE, 64); /* LeakSanitizer opens files at exit */
    return 0;
}
