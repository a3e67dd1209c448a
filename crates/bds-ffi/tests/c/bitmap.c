/* Dirty bitmaps: what was written since a point in time, alone and in a change of several. */
#include "check.h"

int main(void) {
    char path[512], byte = 1, *json;
    bds_context context = new_context();
    bds_node node, other;
    bds_backend backend;
    bds_change change;
    bds_extent areas[4];
    size_t count;
    uint64_t dirty;

    in_dir(path, sizeof path, "disk.qcow2");
    OK(bds_image_create(context, path, "qcow2", "size=1M"));
    OK(bds_node_open_path(context, path, "qcow2", 0, &node));
    backend = new_writer(node);
    OK(bds_bitmap_add(node, "daily", 4096, BDS_BITMAP_PERSISTENT));
    IS(BDS_ERR_EXISTS, bds_bitmap_add(node, "daily", 0, 0));
    IS(BDS_ERR_OPTION, bds_bitmap_add(node, "odd", 1000, 0));
    OK(bds_bitmap_count(node, "daily", &dirty));
    CHECK(dirty == 0);
    OK(bds_pwrite(backend, &byte, 1, 4096, 0));
    OK(bds_pwrite(backend, &byte, 1, 65536, 0));
    OK(bds_bitmap_count(node, "daily", &dirty));
    CHECK(dirty == 8192);
    OK(bds_bitmap_areas(node, "daily", 0, areas, 4, &count));
    CHECK(count == 2 && areas[0].offset == 4096 && areas[0].bytes == 4096);
    CHECK(areas[1].offset == 65536 && areas[1].flags == BDS_EXTENT_DATA);
    OK(bds_bitmap_areas(node, "daily", 8192, areas, 4, &count));
    CHECK(count == 1 && areas[0].offset == 65536);
    OK(bds_bitmap_areas(node, "daily", UINT64_MAX, areas, 4, &count));
    CHECK(count == 0);
    IS(BDS_ERR_NOT_FOUND, bds_bitmap_areas(node, "weekly", 0, areas, 4, &count));

    /* One point in time for several: a new one begins where the old one is cleared. */
    OK(bds_change_create(context, &change));
    OK(bds_change_bitmap_add(change, node, "next", 4096, 0));
    OK(bds_change_bitmap_merge(change, node, "next", node, "daily"));
    OK(bds_change_bitmap_clear(change, node, "daily"));
    OK(bds_change_commit(change, NULL));
    OK(bds_bitmap_count(node, "next", &dirty));
    CHECK(dirty == 8192);
    OK(bds_bitmap_count(node, "daily", &dirty));
    CHECK(dirty == 0);
    OK(bds_change_bitmap_set_enabled(change, node, "daily", 0));
    IS(BDS_ERR_ARGUMENT, bds_change_bitmap_set_enabled(change, node, "daily", 5));
    OK(bds_change_bitmap_remove(change, node, "next"));
    OK(bds_change_commit(change, NULL));
    OK(bds_pwrite(backend, &byte, 1, 0, 0));
    OK(bds_bitmap_count(node, "daily", &dirty));
    CHECK(dirty == 0);
    OK(bds_bitmap_set_enabled(node, "daily", 1));
    IS(BDS_ERR_ARGUMENT, bds_bitmap_set_enabled(node, "daily", 2));
    OK(bds_pwrite(backend, &byte, 1, 0, 0));

    other = new_disk(context, "driver=mem,size=1M");
    OK(bds_bitmap_add(other, "sum", 0, 0));
    OK(bds_bitmap_merge(other, "sum", node, "daily"));
    OK(bds_bitmap_count(other, "sum", &dirty));
    CHECK(dirty > 0);
    OK(bds_bitmap_clear(other, "sum"));
    OK(bds_bitmap_remove(other, "sum"));
    IS(BDS_ERR_NOT_FOUND, bds_bitmap_remove(other, "sum"));
    OK(bds_bitmap_query(node, &json));
    CHECK(has(json, "\"persistent\":true"));

    /* A persistent one is there again. */
    OK(bds_backend_unref(backend));
    OK(bds_node_close(node, NULL));
    OK(bds_node_unref(node));
    OK(bds_node_open_path(context, path, "qcow2", 0, &node));
    OK(bds_bitmap_count(node, "daily", &dirty));
    CHECK(dirty == 4096);

    OK(bds_change_unref(change));
    OK(bds_node_unref(other));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
