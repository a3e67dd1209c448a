/* In the child of a fork every function refuses, and the parent's image is not touched. */
#include <sys/wait.h>

#include "check.h"

int main(void) {
    char byte = 1;
    bds_context context = new_context();
    bds_node node = new_disk(context, "driver=mem,size=1M"), other;
    bds_backend backend = new_writer(node);
    bds_queue queue;
    bds_request request;
    bds_completion done;
    int status;
    pid_t child;

    OK(bds_queue_create(context, NULL, &queue));
    memset(&request, 0, sizeof request);
    request.opcode = BDS_OP_FLUSH;
    request.backend = backend;
    IS(1, bds_queue_submit(queue, &request, 1));
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        int refused = bds_pwrite(backend, &byte, 1, 0, 0) == BDS_ERR_FORKED &&
                      bds_node_ref(node, &other) == BDS_ERR_FORKED &&
                      bds_node_unref(node) == BDS_ERR_FORKED &&
                      bds_queue_poll(queue, &done, 1) == BDS_ERR_FORKED &&
                      bds_context_create(NULL, &context) == BDS_ERR_FORKED &&
                      bds_context_unref(context) == BDS_ERR_FORKED &&
                      strcmp(bds_error_message(), "") == 0;
        _exit(refused ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);

    IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
    OK(bds_pwrite(backend, &byte, 1, 0, 0));
    OK(bds_queue_unref(queue));
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
