/* A queue in epoll, level- and edge-triggered: no wake-up is lost in 20,000 requests, and the fd is
 * quiet when nothing waits. */
#include <sys/epoll.h>
#include <unistd.h>

#include "check.h"

#define REQUESTS 20000
#define DEPTH 8

static void run(bds_context context, bds_backend backend, uint32_t trigger) {
    static char buffers[DEPTH][512];
    bds_queue queue;
    bds_completion done[DEPTH];
    struct epoll_event event = {0};
    int epoll = epoll_create1(0), begun = 0, ended = 0;
    CHECK(epoll >= 0);
    OK(bds_queue_create(context, NULL, &queue));
    event.events = EPOLLIN | trigger;
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, bds_queue_fd(queue), &event) == 0);
    CHECK(epoll_wait(epoll, &event, 1, 0) == 0);
    while (ended < REQUESTS) {
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
        CHECK(epoll_wait(epoll, &event, 1, 10000) == 1);
        /* Edge-triggered: take all that is there, or there is no further edge. */
        for (int taken = DEPTH; taken == DEPTH;) {
            taken = bds_queue_poll(queue, done, DEPTH);
            CHECK(taken >= 0);
            for (int i = 0; i < taken; i++)
                OK((int)done[i].status);
            ended += taken;
        }
    }
    IS(0, bds_queue_in_flight(queue));
    IS(0, bds_queue_poll(queue, done, DEPTH));
    CHECK(epoll_wait(epoll, &event, 1, 0) == 0 || trigger == EPOLLET);
    OK(bds_queue_unref(queue));
    close(epoll);
}

int main(void) {
    bds_context context = new_context();
    bds_node node;
    bds_backend backend;
    OK(bds_node_open(context, "driver=mem,size=1M", &node));
    backend = new_writer(node);
    run(context, backend, 0);
    run(context, backend, EPOLLET);
    (void)bds_backend_unref(backend);
    (void)bds_node_unref(node);
    OK(bds_context_unref(context));
    return 0;
}
