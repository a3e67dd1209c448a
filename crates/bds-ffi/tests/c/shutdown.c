/* A shutdown closes everything and names what is still held; handles still have to be released. */
#include "check.h"

int main(void) {
    bds_context context = new_context(), second;
    bds_node node = new_disk(context, "driver=mem,node-name=disk,size=1M"), other;
    bds_backend backend = new_writer(node);
    char byte, *json;

    OK(bds_context_ref(context, &second));
    CHECK(second.raw != context.raw);
    OK(bds_node_set_holder(node, "the test"));
    IS(BDS_ERR_IN_USE, bds_context_shutdown(context, &json));
    CHECK(has(json, "the test"));
    CHECK(strstr(bds_error_message(), "the test") != NULL);
    IS(-ENOMEDIUM, bds_pread(backend, &byte, 1, 0, 0));
    CHECK(bds_node_open(context, "driver=mem,size=1M", &other) < 0);
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(node));
    OK(bds_context_shutdown(second, NULL));
    IS(BDS_STILL_REFERENCED, bds_context_unref(context));
    OK(bds_context_unref(second));
    return 0;
}
