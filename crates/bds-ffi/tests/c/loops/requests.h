/* A queue that an event loop serves: 100,000 requests, each of which has one completion. */
#ifndef REQUESTS_H
#define REQUESTS_H
#include "check.h"

#define REQUESTS 100000
#define DEPTH 8

static bds_context context;
static bds_node disk;
static bds_backend backend;
static bds_queue queue;
static char buffers[DEPTH][512];
static int begun, ended;

static void begin_requests(void) {
    while (begun < REQUESTS && begun - ended < DEPTH) {
        bds_request request;
        memset(&request, 0, sizeof request);
        request.opcode = begun % 3 ? BDS_OP_READ : BDS_OP_FLUSH;
        request.backend = backend;
        if (request.opcode == BDS_OP_READ) {
            request.offset = (uint64_t)(begun % 2048) * 512;
            request.bytes = 512;
            request.buffer = buffers[begun % DEPTH];
        }
        IS(1, bds_queue_submit(queue, &request, 1));
        begun++;
    }
}

/* What a loop calls when the descriptor is readable; whether all is done. */
static int take_completions(void) {
    bds_completion done[DEPTH];
    int taken = bds_queue_poll(queue, done, DEPTH);
    CHECK(taken > 0); /* a loop is not woken for nothing */
    for (int i = 0; i < taken; i++)
        OK((int)done[i].status);
    ended += taken;
    begin_requests();
    return ended == REQUESTS;
}

static void make_queue(void) {
    context = new_context();
    disk = new_disk(context, "driver=mem,size=1M");
    backend = new_writer(disk);
    OK(bds_queue_create(context, NULL, &queue));
}

static void end_queue(void) {
    IS(0, bds_queue_in_flight(queue));
    OK(bds_queue_unref(queue));
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(disk));
    OK(bds_context_unref(context));
}
#endif
