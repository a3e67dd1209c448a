/* Graph changes: a live snapshot, a filter in and out, all or nothing. */
#include "check.h"

int main(void) {
    char path[512], options[1024], *json, byte = 1;
    bds_context context = new_context(), elsewhere = new_context();
    bds_node base, top, filter, found, foreign;
    bds_backend backend;
    bds_change change;
    uint64_t id, other;

    for (int i = 0; i < 2; i++) {
        in_dir(path, sizeof path, i ? "top.qcow2" : "base.qcow2");
        OK(bds_image_create(context, path, "qcow2", "size=1M"));
        snprintf(options, sizeof options,
                 "driver=qcow2,node-name=%s,file.driver=file,file.filename=%s", i ? "top" : "base",
                 path);
        OK(bds_node_open(context, options, i ? &top : &base));
    }
    backend = new_writer(base);
    OK(bds_pwrite(backend, &byte, 1, 0, 0));

    /* The snapshot: the backend uses 'top', which is backed by 'base'. */
    OK(bds_change_create(context, &change));
    OK(bds_change_append(change, base, top));
    OK(bds_change_commit(change, &json));
    CHECK(has(json, "held-ns"));
    OK(bds_backend_node(backend, &found));
    OK(bds_node_id(found, &id));
    OK(bds_node_id(top, &other));
    CHECK(id == other);
    OK(bds_pread(backend, &byte, 1, 0, 0));
    CHECK(byte == 1);
    IS(BDS_STILL_REFERENCED, bds_node_unref(found));
    OK(bds_graph_child(top, "backing", &found));
    IS(BDS_STILL_REFERENCED, bds_node_unref(found));
    OK(bds_graph_child(top, NULL, &found));
    IS(BDS_STILL_REFERENCED, bds_node_unref(found));
    IS(BDS_ERR_NOT_FOUND, bds_graph_child(top, "spare", &found));

    /* A filter goes in, and out with its node in one change. */
    OK(bds_node_open(context, "driver=throttle,node-name=slow,file=top,limits.iops-total=1000000",
                     &filter));
    OK(bds_change_insert_filter(change, top, filter));
    OK(bds_change_commit(change, NULL));
    OK(bds_pread(backend, &byte, 1, 0, 0));
    OK(bds_change_drop_filter(change, filter));
    OK(bds_change_remove(change, filter));
    OK(bds_change_commit(change, &json));
    CHECK(has(json, "slow"));
    IS(BDS_ERR_STATE, bds_node_query(filter, &json));
    OK(bds_node_unref(filter));
    IS(BDS_ERR_NOT_FOUND, bds_node_find(context, "slow", &found));

    /* An edit that is impossible: nothing has changed, the handles are what they were. */
    OK(bds_change_set_backing(change, base, top)); /* a loop */
    OK(bds_change_rename(change, top, "renamed"));
    IS(BDS_ERR_OPTION, bds_change_commit(change, NULL));
    OK(bds_node_find(context, "top", &found));
    IS(BDS_STILL_REFERENCED, bds_node_unref(found));
    IS(BDS_ERR_OPTION, bds_change_commit(change, NULL)); /* the edits are kept */
    OK(bds_change_clear(change));

    /* A removal that fails gives the reference back. */
    OK(bds_change_remove(change, top));
    IS(BDS_ERR_IN_USE, bds_change_commit(change, NULL));
    OK(bds_node_query(top, &json));
    CHECK(has(json, "\"top\""));
    OK(bds_change_clear(change));

    /* Names are swapped in one change. */
    OK(bds_change_rename(change, top, "base"));
    OK(bds_change_rename(change, base, "top"));
    OK(bds_change_commit(change, NULL));
    OK(bds_node_find(context, "base", &found));
    OK(bds_node_id(found, &id));
    CHECK(id == other);
    IS(BDS_STILL_REFERENCED, bds_node_unref(found));

    /* Nodes of another context are refused, and so are nodes that have ended. */
    foreign = new_disk(elsewhere, "driver=mem,size=1M");
    IS(BDS_ERR_ARGUMENT, bds_change_append(change, top, foreign));
    OK(bds_node_unref(foreign));
    foreign = new_disk(context, "driver=mem,size=1M");
    OK(bds_change_rename(change, foreign, "gone"));
    OK(bds_node_unref(foreign));
    IS(BDS_ERR_STALE, bds_change_commit(change, NULL));
    OK(bds_change_unref(change));
    IS(BDS_ERR_STALE, bds_change_commit(change, NULL));

    /* Reopen read-only, refused while it is written. */
    IS(BDS_ERR_READ_ONLY, bds_node_reopen(top, "read-only=on"));
    OK(bds_backend_unref(backend));
    OK(bds_node_reopen(top, "read-only=on"));
    OK(bds_query(context, "graph", &json));
    CHECK(has(json, "nodes"));
    OK(bds_query(context, "holders", &json));
    CHECK(has(json, "C handle"));
    IS(BDS_ERR_OPTION, bds_query(context, "weather", &json));
    IS(BDS_STILL_REFERENCED, bds_node_unref(base));
    OK(bds_node_unref(top));
    OK(bds_context_shutdown(context, &json));
    CHECK(has(json, "leaked"));
    OK(bds_context_unref(context));
    OK(bds_context_unref(elsewhere));
    return 0;
}
