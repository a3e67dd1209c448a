/* Guards: frozen chains, blocked operations, copy-on-read; each holds until it is released. */
#include "check.h"

static bds_node open_layer(bds_context context, const char *name, const char *backing) {
    char path[512], options[1024];
    in_dir(path, sizeof path, name);
    OK(bds_image_create(context, path, "qcow2", "size=1M"));
    snprintf(options, sizeof options, "driver=qcow2,node-name=%s,file.driver=file,file.filename=%s%s%s",
             name, path, backing ? ",backing=" : "", backing ? backing : "");
    return new_disk(context, options);
}

int main(void) {
    bds_context context = new_context(), elsewhere = new_context();
    bds_node base = new_disk(context, "driver=mem,node-name=base,size=1M"), none = {0};
    bds_node top = open_layer(context, "top", "base"), foreign;
    bds_backend reader;
    bds_change change;
    bds_guard guard, second;
    bds_extent extent;
    size_t count;
    char *json, byte;

    /* A frozen link: no change moves it, but that of the guard's holder. */
    OK(bds_graph_freeze_chain(top, base, "the exporter", &guard));
    IS(BDS_ERR_IN_USE, bds_graph_freeze_chain(top, base, "another", &second));
    CHECK(strstr(bds_error_message(), "the exporter") != NULL);
    IS(BDS_ERR_OPTION, bds_graph_freeze_chain(base, top, "upside down", &second));
    OK(bds_node_query(top, &json));
    CHECK(has(json, "the exporter"));
    OK(bds_change_create(context, &change));
    OK(bds_change_set_backing(change, top, none));
    IS(BDS_ERR_IN_USE, bds_change_commit(change, NULL));
    CHECK(strstr(bds_error_message(), "frozen by the exporter") != NULL);
    OK(bds_change_clear(change));
    OK(bds_change_thaw(change, guard));
    OK(bds_change_set_backing(change, top, none));
    OK(bds_change_set_backing(change, top, base));
    OK(bds_change_commit(change, NULL));
    OK(bds_guard_unref(guard));
    IS(BDS_ERR_STALE, bds_guard_unref(guard));
    IS(BDS_ERR_STALE, bds_change_thaw(change, guard));
    OK(bds_graph_freeze_chain(top, base, "another", &guard));
    OK(bds_change_thaw(change, guard));
    OK(bds_guard_unref(guard));
    IS(BDS_ERR_STALE, bds_change_commit(change, NULL)); /* the guard has ended */
    OK(bds_change_clear(change));

    /* Blocked operations: the reason is what the next user reads. */
    IS(BDS_ERR_ARGUMENT, bds_node_block(base, 0, "nothing", &guard));
    IS(BDS_ERR_VERSION, bds_node_block(base, BDS_BLOCK_ALL + 1, "what", &guard));
    OK(bds_node_block(base, BDS_BLOCK_RESIZE | BDS_BLOCK_DELETE, "a copy is made", &guard));
    OK(bds_node_block(base, BDS_BLOCK_RESIZE, "it is exported", &second));
    OK(bds_node_blockers(base, &json));
    CHECK(strstr(json, "\"delete\":[\"a copy is made\"]") != NULL);
    CHECK(has(json, "it is exported"));
    IS(BDS_ERR_ARGUMENT, bds_change_thaw(change, guard));
    foreign = new_disk(elsewhere, "driver=mem,size=1M");
    IS(BDS_ERR_ARGUMENT, bds_graph_freeze_chain(top, foreign, "x", &second));
    OK(bds_node_unref(foreign));
    reader = new_writer(base);
    IS(BDS_ERR_IN_USE, bds_resize(reader, 2 << 20, NULL, 0));
    CHECK(strstr(bds_error_message(), "a copy is made") != NULL);
    OK(bds_guard_unref(guard));
    IS(BDS_ERR_IN_USE, bds_resize(reader, 2 << 20, NULL, 0));
    OK(bds_guard_unref(second));
    OK(bds_resize(reader, 2 << 20, NULL, 0));
    OK(bds_resize(reader, 1 << 20, NULL, BDS_RESIZE_SHRINK));
    memset(&byte, 7, 1);
    OK(bds_pwrite(reader, &byte, 1, 4096, 0));
    OK(bds_backend_unref(reader));

    /* What is read through the top is copied into it while the guard lives, or by hand. */
    reader = new_writer(top);
    OK(bds_pread(reader, &byte, 1, 4096, 0));
    OK(bds_block_status(reader, base, 4096, 1, &extent, 1, &count));
    CHECK(count == 1 && (extent.flags & BDS_EXTENT_ALLOCATED) == 0);
    OK(bds_node_copy_on_read(top, &guard));
    OK(bds_pread(reader, &byte, 1, 4096, 0));
    CHECK(byte == 7);
    OK(bds_guard_unref(guard));
    OK(bds_block_status(reader, base, 4096, 1, &extent, 1, &count));
    CHECK(count == 1 && (extent.flags & BDS_EXTENT_ALLOCATED) != 0);
    OK(bds_image_copy_up(reader, 512 * 1024, 65536));
    OK(bds_block_status(reader, base, 512 * 1024, 65536, &extent, 1, &count));
    CHECK((extent.flags & BDS_EXTENT_ALLOCATED) != 0 && extent.bytes == 65536);
    /* All of it goes again. */
    OK(bds_image_make_empty(reader));
    OK(bds_block_status(reader, base, 4096, 1, &extent, 1, &count));
    CHECK((extent.flags & BDS_EXTENT_ALLOCATED) == 0);
    OK(bds_pread(reader, &byte, 1, 4096, 0));
    CHECK(byte == 7);
    IS(BDS_ERR_RANGE, bds_image_copy_up(reader, 1 << 20, 1));

    /* The recorded backing file is one thing, the open chain another. */
    IS(BDS_ERR_ARGUMENT, bds_image_set_backing_file(reader, NULL, "raw"));
    OK(bds_image_set_backing_file(reader, "base.raw", "raw"));
    {
        char path[512];
        OK(bds_image_info(context, in_dir(path, sizeof path, "top"), "qcow2", 0, &json));
        CHECK(has(json, "\"backing-filename\":\"base.raw\""));
        OK(bds_image_set_backing_file(reader, NULL, NULL));
        OK(bds_image_info(context, path, "qcow2", 0, &json));
        CHECK(strstr(json, "backing-filename") == NULL);
        bds_free(json);
    }

    OK(bds_backend_unref(reader));
    OK(bds_change_unref(change));
    OK(bds_node_close(top, NULL));
    OK(bds_node_unref(top));
    OK(bds_node_unref(base));
    OK(bds_context_unref(context));
    OK(bds_context_unref(elsewhere));
    return 0;
}
