/* A handle is one reference: released once, stale for ever, without effect on other owners. */
#include "check.h"

int main(void) {
    bds_context context = new_context();
    bds_node node = new_disk(context, "driver=mem,node-name=disk,size=1M"), other, third;
    uint64_t id, other_id;

    OK(bds_node_ref(node, &other));
    CHECK(node.raw != other.raw);
    OK(bds_node_id(node, &id));
    OK(bds_node_id(other, &other_id));
    CHECK(id == other_id);

    /* Two owners: the second release of one takes nothing from the other. */
    IS(BDS_STILL_REFERENCED, bds_node_unref(node));
    IS(BDS_ERR_STALE, bds_node_unref(node));
    IS(BDS_ERR_STALE, bds_node_id(node, &id));
    OK(bds_node_id(other, &other_id));

    /* The weak id: acquire succeeds while the node lives. */
    OK(bds_node_acquire(context, id, &third));
    IS(BDS_STILL_REFERENCED, bds_node_unref(other));
    OK(bds_node_unref(third));
    IS(BDS_ERR_STALE, bds_node_acquire(context, id, &third));
    IS(BDS_ERR_STALE, bds_node_unref(third));

    /* 0 is no handle, and unref_p clears. */
    node.raw = 0;
    IS(BDS_ERR_STALE, bds_node_unref(node));
    node = new_disk(context, "driver=mem,size=1M");
    OK(bds_node_unref_p(&node));
    CHECK(node.raw == 0);
    OK(bds_node_unref_p(&node));

    /* A context is held by its objects. */
    node = new_disk(context, "driver=mem,size=1M");
    IS(BDS_STILL_REFERENCED, bds_context_unref(context));
    IS(BDS_ERR_STALE, bds_context_unref(context));
    OK(bds_node_id(node, &id));
    OK(bds_node_unref(node));
    return 0;
}
