/* A signal a millisecond, without SA_RESTART, to whichever thread: no call of the library fails for
 * it, and none loses a completion. */
#include <signal.h>
#include <sys/time.h>

#include "check.h"

#define ROUNDS 300

static volatile sig_atomic_t count;

static void on_alarm(int number) {
    (void)number;
    count = count + 1;
}

int main(void) {
    char path[512];
    static char block[65536];
    struct sigaction action;
    struct itimerval often = {{0, 1000}, {0, 1000}};
    bds_context context = new_context();
    bds_node node;
    bds_backend backend;
    bds_queue queue;
    bds_request request;
    bds_completion done;

    memset(&action, 0, sizeof action);
    action.sa_handler = on_alarm;
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    in_dir(path, sizeof path, "disk.qcow2");
    OK(bds_image_create(context, path, "qcow2", "size=64M"));
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    OK(bds_node_open_path(context, path, "qcow2", 0, &node));
    backend = new_writer(node);
    OK(bds_queue_create(context, NULL, &queue));
    for (int i = 0; i < ROUNDS || count < 100; i++) {
        uint64_t offset = (uint64_t)(i % 512) * sizeof block;
        memset(block, i, sizeof block);
        OK(bds_pwrite(backend, block, sizeof block, offset, i % 50 ? 0 : BDS_REQ_FUA));
        memset(&request, 0, sizeof request);
        request.opcode = i % 10 ? BDS_OP_READ : BDS_OP_FLUSH;
        request.backend = backend;
        if (request.opcode == BDS_OP_READ) {
            request.offset = offset;
            request.bytes = sizeof block;
            request.buffer = block;
        }
        IS(1, bds_queue_submit(queue, &request, 1));
        IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
        OK((int)done.status);
        CHECK(block[0] == (char)i && block[sizeof block - 1] == (char)i);
        if (i % 60 == 0)
            IS(-ETIME, bds_queue_wait(queue, &done, 1, 1, 5000000));
    }
    OK(bds_queue_unref(queue));
    OK(bds_backend_unref(backend));
    OK(bds_node_close(node, NULL));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
