/* Structs that begin with their size: shorter ones, longer ones with and without a known tail. */
#include "check.h"

struct later_options {
    bds_context_options known;
    uint64_t tail;
};

int main(void) {
    bds_context context;
    struct later_options later;
    bds_node node;
    bds_limits limits;
    struct {
        bds_limits known;
        uint64_t tail;
    } later_limits;

    memset(&later, 0, sizeof later);
    later.known.struct_size = sizeof later;
    OK(bds_context_create(&later.known, &context));
    OK(bds_context_unref(context));
    later.tail = 1;
    IS(BDS_ERR_VERSION, bds_context_create(&later.known, &context));
    later.known.struct_size = 16; /* an older, shorter struct */
    OK(bds_context_create(&later.known, &context));
    OK(bds_context_unref(context));
    for (size_t size = 0; size < 8; size++) {
        later.known.struct_size = size;
        IS(BDS_ERR_VERSION, bds_context_create(&later.known, &context));
    }
    later.known.struct_size = SIZE_MAX;
    IS(BDS_ERR_VERSION, bds_context_create(&later.known, &context));
    later.known.struct_size = sizeof later.known;
    later.known.log_level = BDS_LOG_TRACE + 1;
    IS(BDS_ERR_VERSION, bds_context_create(&later.known, &context));
    later.known.log_level = 0;
    later.known.flags = ~0u;
    IS(BDS_ERR_VERSION, bds_context_create(&later.known, &context));
    later.known.flags = BDS_CONTEXT_SAME_DIRECTORY | BDS_CONTEXT_TRUST_REFERENCES;
    IS(BDS_ERR_ARGUMENT, bds_context_create(&later.known, &context));

    context = new_context();
    node = new_disk(context, "driver=mem,size=1M");
    memset(&limits, 0xff, sizeof limits);
    IS(BDS_ERR_VERSION, bds_node_limits(node, &limits));
    limits.struct_size = sizeof limits;
    OK(bds_node_limits(node, &limits));
    CHECK(limits.struct_size == sizeof limits && limits.length == 1 << 20);
    CHECK(limits.reserved == 0 && limits.max_iov > 0);
    /* An older caller's struct ends before `length`. */
    memset(&limits, 0xff, sizeof limits);
    limits.struct_size = 24;
    OK(bds_node_limits(node, &limits));
    CHECK(limits.length == UINT64_MAX && limits.max_iov != UINT32_MAX);
    /* A later caller's unknown tail becomes zero. */
    memset(&later_limits, 0xff, sizeof later_limits);
    later_limits.known.struct_size = sizeof later_limits;
    OK(bds_node_limits(node, &later_limits.known));
    CHECK(later_limits.tail == 0 && later_limits.known.length == 1 << 20);

    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
