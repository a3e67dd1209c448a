/* The other edits of a change, drained sections, activity, poison, copies on the host. */
#include "check.h"

int main(void) {
    char byte = 1, path[512];
    bds_context context = new_context();
    bds_node a = new_disk(context, "driver=mem,node-name=a,size=1M"), found;
    bds_node b = new_disk(context, "driver=mem,node-name=b,size=1M");
    bds_node raw = new_disk(context, "driver=raw,node-name=top,file=a");
    bds_backend drive, writer;
    bds_change change;
    bds_section section, all;
    uint64_t id, wanted;

    OK(bds_backend_create(context, NULL, &drive));
    OK(bds_change_create(context, &change));
    OK(bds_change_insert(change, drive, raw));
    OK(bds_change_own(change, b));
    OK(bds_change_commit(change, NULL));
    OK(bds_pread(drive, &byte, 1, 0, 0));

    /* 'top' reads from 'b' instead of 'a', inside a drained section. */
    OK(bds_graph_drain_begin(raw, BDS_DRAIN_SUBTREE, -1, &section));
    OK(bds_graph_drain_all(context, &all));
    OK(bds_graph_drain_end(all));
    OK(bds_change_within(change, section));
    OK(bds_change_replace_child(change, raw, "file", b));
    OK(bds_change_commit(change, NULL));
    OK(bds_graph_drain_end(section));
    OK(bds_graph_child(raw, "file", &found));
    OK(bds_node_id(found, &id));
    OK(bds_node_id(b, &wanted));
    CHECK(id == wanted);
    IS(BDS_STILL_REFERENCED, bds_node_unref(found));
    IS(BDS_ERR_STALE, bds_change_within(change, section));

    /* All users of 'b' use 'a', and the monitor gives 'b' up. */
    OK(bds_change_replace(change, b, a));
    OK(bds_change_disown(change, b));
    OK(bds_change_reopen(change, raw, "discard=unmap"));
    OK(bds_change_commit(change, NULL));
    OK(bds_node_unref(b));
    OK(bds_change_eject(change, drive));
    OK(bds_change_commit(change, NULL));
    IS(-ENOMEDIUM, bds_pread(drive, &byte, 1, 0, 0));

    /* A section of a backend is not one of nodes. */
    OK(bds_backend_drain(drive, &section));
    IS(BDS_ERR_ARGUMENT, bds_change_within(change, section));
    OK(bds_graph_drain_end(section));
    IS(BDS_ERR_ARGUMENT, bds_graph_drain_begin(raw, BDS_DRAIN_SUBTREE, 0, &section));
    OK(bds_graph_drain_begin(raw, 0, 1000000000, &section));
    OK(bds_graph_drain_end(section));

    /* Hand-over: an inactive node cannot be written. */
    writer = new_writer(raw);
    IS(BDS_ERR_INACTIVE, bds_node_set_active(raw, 0));
    OK(bds_backend_unref(writer));
    OK(bds_node_set_active(raw, 0));
    {
        bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
        options.flags = BDS_BACKEND_WRITABLE;
        IS(BDS_ERR_INACTIVE, bds_backend_create_on(raw, &options, &writer));
    }
    IS(BDS_ERR_ARGUMENT, bds_node_set_active(raw, 2));
    OK(bds_node_set_active(raw, 1));

    /* A copy that the host may or may not do. */
    {
        bds_node file, file2;
        bds_backend from, to;
        int result;
        in_dir(path, sizeof path, "a.raw");
        OK(bds_image_create(context, path, "raw", "size=1M"));
        OK(bds_node_open_path(context, path, "file", 0, &file));
        in_dir(path, sizeof path, "b.raw");
        OK(bds_image_create(context, path, "raw", "size=1M"));
        OK(bds_node_open_path(context, path, "file", 0, &file2));
        from = new_writer(file);
        to = new_writer(file2);
        OK(bds_pwrite(from, "hello", 5, 0, 0));
        result = bds_copy_range(from, 0, to, 4096, 4096, 0);
        CHECK(result == BDS_OK || result == BDS_ERR_UNSUPPORTED);
        IS(BDS_ERR_RANGE, bds_copy_range(from, 1 << 20, to, 0, 4096, 0));
        OK(bds_backend_unref(from));
        OK(bds_backend_unref(to));
        OK(bds_node_unref(file));
        OK(bds_node_unref(file2));
    }

    /* A poisoned node fails requests. */
    OK(bds_backend_insert(drive, raw));
    OK(bds_node_poison(raw));
    CHECK(bds_pread(drive, &byte, 1, 0, 0) < 0);
    OK(bds_backend_revoke(drive));

    OK(bds_change_unref(change));
    OK(bds_backend_unref(drive));
    OK(bds_node_unref(raw));
    (void)bds_node_unref(a); /* 'top' may still be closing, and holds it until then */
    OK(bds_context_unref(context));
    return 0;
}
