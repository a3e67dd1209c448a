/* A request that waits is cancelled: its completion comes, once, and says so. */
#include "check.h"

int main(void) {
    char buffer[512];
    bds_context context = new_context();
    bds_node node = new_disk(context, "driver=mem,size=1M");
    bds_backend backend = new_writer(node);
    bds_queue queue;
    bds_section section;
    bds_request request;
    bds_completion done[2];

    OK(bds_queue_create(context, NULL, &queue));
    OK(bds_graph_drain_begin(node, 0, -1, &section));
    memset(&request, 0, sizeof request);
    memset(buffer, 1, sizeof buffer);
    request.opcode = BDS_OP_WRITE;
    request.backend = backend;
    request.bytes = sizeof buffer;
    request.buffer = buffer;
    request.user_data = 7;
    /* It waits at the gate of the drained section. */
    IS(1, bds_queue_submit(queue, &request, 1));
    IS(-ETIME, bds_queue_wait(queue, done, 2, 1, 1000000));
    IS(1, bds_queue_in_flight(queue));
    OK(bds_queue_cancel(queue, request.request_id));
    IS(1, bds_queue_wait(queue, done, 2, 1, -1));
    IS(BDS_ERR_CANCELLED, done[0].status);
    CHECK(done[0].user_data == 7 && done[0].request_id == request.request_id);
    IS(BDS_ERR_NOT_FOUND, bds_queue_cancel(queue, request.request_id));

    /* One that is not cancelled goes on after the section. */
    IS(1, bds_queue_submit(queue, &request, 1));
    IS(-ETIME, bds_queue_wait(queue, done, 2, 1, 1000000));
    OK(bds_graph_drain_end(section));
    IS(BDS_ERR_STALE, bds_graph_drain_end(section));
    IS(1, bds_queue_wait(queue, done, 2, 1, -1));
    OK(done[0].status);
    memset(buffer, 0, sizeof buffer);
    OK(bds_pread(backend, buffer, sizeof buffer, 0, 0));
    CHECK(buffer[0] == 1);

    OK(bds_queue_unref(queue));
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
