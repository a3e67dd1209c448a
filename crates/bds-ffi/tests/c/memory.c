/* Registered regions bound what a request can reach, and live until its completion. */
#include "check.h"

int main(void) {
    void *guest;
    char *bytes;
    bds_context context = new_context();
    bds_node node = new_disk(context, "driver=mem,size=1M");
    bds_backend backend = new_writer(node);
    bds_memory memory;
    bds_queue queue;
    bds_section section;
    bds_request request;
    bds_completion done;
    struct iovec parts[2];

    IS(BDS_ERR_ARGUMENT, bds_buffer_alloc(100, 3, &guest));
    IS(BDS_ERR_ARGUMENT, bds_buffer_alloc(100, 1u << 20, &guest));
    OK(bds_buffer_alloc(65536, 4096, &guest));
    bytes = (char *)guest;
    CHECK((uintptr_t)guest % 4096 == 0 && bytes[0] == 0 && bytes[65535] == 0);
    IS(BDS_ERR_ARGUMENT, bds_memory_register(NULL, 4096, &memory));
    OK(bds_memory_register(guest, 65536, &memory));
    OK(bds_queue_create(context, NULL, &queue));

    memset(&request, 0, sizeof request);
    request.opcode = BDS_OP_WRITE;
    request.backend = backend;
    request.bytes = 4096;
    request.memory = memory;
    request.buffer = bytes + 65536 - 4096;
    memset(request.buffer, 3, 4096);
    IS(1, bds_queue_submit(queue, &request, 1));
    IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
    OK(done.status);
    request.buffer = bytes + 65536 - 4095;
    IS(BDS_ERR_RANGE, bds_queue_submit(queue, &request, 1));
    request.buffer = bytes - 1;
    IS(BDS_ERR_RANGE, bds_queue_submit(queue, &request, 1));
    request.buffer = NULL;
    request.iov = parts;
    request.iovcnt = 2;
    parts[0].iov_base = bytes;
    parts[0].iov_len = 4000;
    parts[1].iov_base = bytes + 65536;
    parts[1].iov_len = 96;
    IS(BDS_ERR_RANGE, bds_queue_submit(queue, &request, 1));
    parts[1].iov_base = bytes + 4000;
    parts[1].iov_len = 97;
    IS(BDS_ERR_ARGUMENT, bds_queue_submit(queue, &request, 1)); /* not the sum */
    parts[1].iov_len = 96;

    /* A request in flight keeps the region. */
    OK(bds_graph_drain_begin(node, 0, -1, &section));
    IS(1, bds_queue_submit(queue, &request, 1));
    IS(BDS_STILL_REFERENCED, bds_memory_unref(memory));
    IS(BDS_ERR_STALE, bds_memory_unref(memory));
    IS(BDS_ERR_STALE, bds_queue_submit(queue, &request, 1));
    OK(bds_graph_drain_end(section));
    IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
    OK(done.status);
    bds_buffer_free(guest);
    bds_buffer_free(NULL);

    OK(bds_queue_unref(queue));
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
