/* Events are fetched one by one and announced by a descriptor. */
#include <poll.h>

#include "check.h"

static int drain(bds_context context, const char *wanted) {
    bds_event event;
    char *json;
    int found = 0, result;
    uint64_t last = 0;
    while ((result = bds_context_next_event(context, &event, &json)) == 1) {
        CHECK(event.sequence > last);
        last = event.sequence;
        found += strstr(json, wanted) != NULL;
        bds_free(json);
    }
    OK(result);
    return found;
}

int main(void) {
    bds_context context = new_context();
    bds_node node = new_disk(context, "driver=mem,node-name=disk,size=1M");
    bds_backend backend = new_writer(node);
    struct pollfd fd;
    int found = 0;
    char byte = 1;
    CHECK(drain(context, "BLOCK_NODE_OPENED") == 1);

    fd.fd = bds_context_event_fd(context);
    fd.events = POLLIN;
    CHECK(fd.fd >= 0 && bds_context_event_fd(context) == fd.fd);
    CHECK(poll(&fd, 1, 0) == 0);
    OK(bds_node_set_write_threshold(node, 4096));
    OK(bds_pwrite(backend, &byte, 1, 8192, 0));
    while (!found) {
        CHECK(poll(&fd, 1, 10000) == 1);
        found = drain(context, "BLOCK_WRITE_THRESHOLD");
    }
    CHECK(poll(&fd, 1, 0) == 0);

    /* Attaching and detaching a device. */
    OK(bds_backend_attach_device(backend, "vda"));
    IS(BDS_ERR_IN_USE, bds_backend_attach_device(backend, "vdb"));
    OK(bds_backend_detach_device(backend));
    IS(BDS_ERR_STATE, bds_backend_detach_device(backend));
    for (found = 0; found < 2;) {
        CHECK(poll(&fd, 1, 10000) == 1);
        found += drain(context, "BLOCK_DEVICE_");
    }
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(node));
    for (found = 0; !found;) {
        CHECK(poll(&fd, 1, 10000) == 1);
        found = drain(context, "BLOCK_NODE_CLOSED");
    }
    OK(bds_context_unref(context));
    return 0;
}
