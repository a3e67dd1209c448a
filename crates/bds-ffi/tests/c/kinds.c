/* The number of one kind of handle is refused where another kind is expected. */
#include "check.h"

int main(void) {
    bds_context context = new_context();
    bds_node node = new_disk(context, "driver=mem,size=1M");
    bds_backend backend = new_writer(node);
    bds_queue queue;
    bds_node forged;
    uint64_t id;
    char byte;
    OK(bds_queue_create(context, NULL, &queue));

    forged.raw = queue.raw;
    IS(BDS_ERR_KIND, bds_node_unref(forged));
    forged.raw = backend.raw;
    IS(BDS_ERR_KIND, bds_node_id(forged, &id));
    IS(BDS_ERR_KIND, bds_pread(*(bds_backend *)&node, &byte, 1, 0, 0));
    /* Neither is a node's id a handle. */
    OK(bds_node_id(node, &id));
    forged.raw = id;
    IS(BDS_ERR_KIND, bds_node_unref(forged));
    /* Numbers that were never given out. */
    forged.raw = node.raw ^ 1;
    IS(BDS_ERR_STALE, bds_node_unref(forged));
    forged.raw = ~(uint64_t)0;
    CHECK(bds_node_unref(forged) < -10000);

    OK(bds_pread(backend, &byte, 1, 0, 0));
    OK(bds_queue_unref(queue));
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
