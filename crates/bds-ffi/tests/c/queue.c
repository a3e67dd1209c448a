/* A queue: batches, one completion for each accepted request, refusals, cancel, wake, poll(2). */
#include <poll.h>

#include "check.h"

#define DEPTH 32

int main(void) {
    static char buffers[64][4096];
    char path[512];
    bds_context context = new_context();
    bds_node node;
    bds_backend backend;
    bds_queue queue;
    bds_queue_options options = BDS_QUEUE_OPTIONS_INIT;
    bds_request requests[64];
    bds_completion done[64];
    int seen[64] = {0}, count = 0, left;
    struct pollfd fd;

    in_dir(path, sizeof path, "disk.raw");
    OK(bds_image_create(context, path, "raw", "size=1M"));
    OK(bds_node_open_path(context, path, "raw", 0, &node));
    backend = new_writer(node);
    options.depth = DEPTH;
    OK(bds_queue_create(context, &options, &queue));
    fd.fd = bds_queue_fd(queue);
    fd.events = POLLIN;
    CHECK(fd.fd >= 0);
    CHECK(bds_queue_fd(queue) == fd.fd);
    CHECK(poll(&fd, 1, 0) == 0);

    /* More requests than the depth: the rest is the caller's to submit again. */
    memset(requests, 0, sizeof requests);
    for (int i = 0; i < 64; i++) {
        memset(buffers[i], i + 1, sizeof buffers[i]);
        requests[i].opcode = BDS_OP_WRITE;
        requests[i].backend = backend;
        requests[i].offset = (uint64_t)i * 4096;
        requests[i].bytes = 4096;
        requests[i].buffer = buffers[i];
        requests[i].user_data = (uint64_t)i;
    }
    IS(DEPTH, bds_queue_submit(queue, requests, 64));
    IS(-EAGAIN, bds_queue_submit(queue, requests + DEPTH, 1));
    CHECK(requests[0].request_id != 0 && requests[DEPTH].request_id == 0);
    for (int begun = DEPTH; count < 64;) {
        CHECK(poll(&fd, 1, 10000) == 1);
        int taken = bds_queue_poll(queue, done, 64);
        CHECK(taken > 0);
        for (int i = 0; i < taken; i++) {
            OK(done[i].status);
            CHECK(done[i].user_data < 64 && seen[done[i].user_data]++ == 0);
            CHECK(done[i].request_id == requests[done[i].user_data].request_id);
        }
        count += taken;
        if (begun < 64) {
            int more = bds_queue_submit(queue, requests + begun, (size_t)(64 - begun));
            CHECK(more > 0 || more == -EAGAIN);
            begun += more > 0 ? more : 0;
        }
    }
    CHECK(poll(&fd, 1, 0) == 0);
    IS(0, bds_queue_in_flight(queue));

    /* A flush, and a read into two segments. */
    {
        struct iovec parts[2] = {{buffers[0], 1000}, {buffers[1], 3096}};
        bds_request two[2];
        memset(two, 0, sizeof two);
        two[0].opcode = BDS_OP_FLUSH;
        two[0].backend = backend;
        two[1].opcode = BDS_OP_READ;
        two[1].backend = backend;
        two[1].offset = 5 * 4096;
        two[1].iov = parts;
        two[1].iovcnt = 2;
        IS(2, bds_queue_submit(queue, two, 2));
        memset(parts, 0, sizeof parts); /* the array itself was copied */
        IS(2, bds_queue_wait(queue, done, 64, 2, -1));
        OK(done[0].status);
        OK(done[1].status);
        CHECK(buffers[0][0] == 6 && buffers[0][999] == 6 && buffers[1][3095] == 6);
    }

    /* A refused request leaves its buffer with the caller, and the ones before it go on. */
    requests[1].flags = 1u << 31;
    IS(1, bds_queue_submit(queue, requests, 2));
    IS(BDS_ERR_VERSION, bds_queue_submit(queue, requests + 1, 1));
    requests[1].flags = 0;
    requests[1].opcode = 99;
    IS(BDS_ERR_VERSION, bds_queue_submit(queue, requests + 1, 1));
    requests[1].opcode = BDS_OP_WRITE;
    requests[1].reserved[2] = 1;
    IS(BDS_ERR_VERSION, bds_queue_submit(queue, requests + 1, 1));
    requests[1].reserved[2] = 0;
    requests[1].buffer = NULL;
    IS(BDS_ERR_ARGUMENT, bds_queue_submit(queue, requests + 1, 1));
    requests[1].buffer = buffers[1];
    requests[1].backend.raw ^= 1;
    IS(BDS_ERR_STALE, bds_queue_submit(queue, requests + 1, 1));
    IS(1, bds_queue_wait(queue, done, 1, 1, -1));

    /* What the medium says comes with the completion. */
    requests[0].offset = 1 << 20;
    IS(1, bds_queue_submit(queue, requests, 1));
    IS(1, bds_queue_wait(queue, done, 1, 1, -1));
    IS(BDS_ERR_RANGE, done[0].status);

    /* Nothing to wait for. */
    IS(-ETIME, bds_queue_wait(queue, done, 1, 1, 1000000));
    IS(0, bds_queue_wait(queue, done, 1, 0, -1));
    IS(BDS_ERR_ARGUMENT, bds_queue_wait(queue, done, 1, 2, 0));
    IS(0, bds_queue_poll(queue, done, 64));
    IS(BDS_ERR_NOT_FOUND, bds_queue_cancel(queue, requests[0].request_id));
    OK(bds_queue_wake(queue));

    /* The queue may go first, with completions that were not taken. */
    requests[0].offset = 0;
    IS(1, bds_queue_submit(queue, requests, 1));
    do {
        left = bds_queue_in_flight(queue);
    } while (left > 0 && bds_queue_cancel(queue, requests[0].request_id) != -EALREADY &&
             poll(&fd, 1, 10) == 0);
    left = bds_queue_unref(queue);
    CHECK(left == BDS_OK || left == BDS_STILL_REFERENCED);
    IS(BDS_ERR_STALE, bds_queue_submit(queue, requests, 1));
    IS(BDS_ERR_STALE, bds_queue_unref(queue));
    (void)bds_backend_unref(backend);
    (void)bds_node_unref(node);
    (void)bds_context_unref(context);
    return 0;
}
