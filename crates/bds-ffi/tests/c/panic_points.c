/* Panics inside the library, at points that tests arm in builds with debug assertions: every
 * accepted request has its completion all the same, and every event is delivered or counted. */
#include <poll.h>

#include "check.h"

#ifdef __cplusplus
extern "C"
#endif
    extern int bds_test_panic_at(const char *point, uint64_t skip) __attribute__((weak));

static char buffer[4096];

/* A read of a new disk; its node is released, the backend keeps it. */
static bds_request a_read(bds_context context, const char *options) {
    bds_request request;
    bds_node node = new_disk(context, options);
    memset(&request, 0, sizeof request);
    request.opcode = BDS_OP_READ;
    request.backend = new_writer(node);
    request.buffer = buffer;
    request.bytes = sizeof buffer;
    (void)bds_node_unref(node);
    return request;
}

/* Submits one request with a point armed, which is reached; returns the completion's status. */
static int status_of(bds_queue queue, bds_request *request, const char *point) {
    bds_completion done;
    (void)bds_test_panic_at(point, 0);
    IS(1, bds_queue_submit(queue, request, 1));
    IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
    IS(0, bds_test_panic_at("", 0));
    IS(0, bds_queue_in_flight(queue));
    IS(0, bds_queue_poll(queue, &done, 1));
    return (int)done.status;
}

static void requests(bds_context context) {
    const char *slow = "driver=null-aio,size=1M,latency-ns=1000000", *fast = "driver=mem,size=1M";
    bds_queue queue;
    bds_request read = a_read(context, slow), batch[3];
    bds_completion done[3];
    OK(bds_queue_create(context, NULL, &queue));

    /* While the task of a request is spawned: nothing is known about what it did. */
    IS(BDS_ERR_PANIC, status_of(queue, &read, "spawn"));
    IS(1, bds_queue_submit(queue, &read, 1)); /* the node is poisoned */
    IS(1, bds_queue_wait(queue, done, 1, 1, -1));
    IS(-EIO, (int)done[0].status);
    (void)bds_backend_unref(read.backend);

    /* While its resources are dropped, after it ran in a task. */
    read = a_read(context, slow);
    IS(BDS_ERR_PANIC, status_of(queue, &read, "ticket"));
    (void)bds_backend_unref(read.backend);

    /* The same after the submission did it: its outcome was known before. */
    read = a_read(context, fast);
    OK(status_of(queue, &read, "ticket"));
    (void)bds_backend_unref(read.backend);

    /* While the second request of a batch is checked (after queue and first backend): the first
     * was accepted, the third was not begun. */
    batch[0] = a_read(context, fast);
    batch[1] = batch[2] = a_read(context, fast);
    (void)bds_test_panic_at("lookup", 2);
    IS(1, bds_queue_submit(queue, batch, 3));
    IS(0, bds_test_panic_at("", 0));
    IS(1, bds_queue_wait(queue, done, 3, 1, -1));
    OK((int)done[0].status);
    IS(0, bds_queue_in_flight(queue));
    IS(1, bds_queue_submit(queue, batch, 1));
    IS(1, bds_queue_wait(queue, done, 3, 1, -1));
    (void)bds_backend_unref(batch[0].backend);
    (void)bds_backend_unref(batch[1].backend);
    OK(bds_queue_unref(queue));
}

/* An event whose delivery panics is counted, and the one behind it comes. */
static void events(bds_context context) {
    bds_node disk = new_disk(context, "driver=mem,size=1M");
    bds_backend drive;
    bds_event event;
    struct pollfd fd;
    int lost = 0, ejected = 0;
    memset(&event, 0, sizeof event);
    OK(bds_backend_create(context, NULL, &drive));
    fd.fd = bds_context_event_fd(context);
    fd.events = POLLIN;
    CHECK(fd.fd >= 0);
    while (bds_context_next_event(context, &event, NULL) == 1)
        ;
    (void)bds_test_panic_at("event", 0);
    OK(bds_backend_insert(drive, disk));
    IS(1, bds_backend_eject(drive));
    while (lost == 0 || ejected == 0) {
        CHECK(poll(&fd, 1, 60000) == 1);
        while (bds_context_next_event(context, &event, NULL) == 1) {
            lost += event.type == BDS_EVENT_LOST && event.value == 1;
            ejected += event.type == BDS_EVENT_MEDIUM_EJECTED;
        }
    }
    IS(0, bds_test_panic_at("", 0));
    (void)bds_backend_unref(drive);
    (void)bds_node_unref(disk);
}

int main(void) {
    bds_context context;
    if (bds_test_panic_at == NULL)
        return 0; /* a build without the points */
    context = new_context();
    requests(context);
    events(context);
    OK(bds_context_unref(context));
    return 0;
}
