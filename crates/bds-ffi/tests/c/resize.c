/* A raw image grows and shrinks; shrinking takes a flag, because it destroys data. */
#include "check.h"

int main(void) {
    bds_context context = new_context();
    char path[512];
    bds_node node;
    bds_backend backend;
    uint64_t length;
    in_dir(path, sizeof path, "disk.raw");
    OK(bds_image_create(context, path, "raw", "size=1M"));
    OK(bds_node_open_path(context, path, "raw", 0, &node));
    backend = new_writer(node);
    OK(bds_resize(backend, 4 << 20, "full", 0));
    IS(BDS_ERR_OPTION, bds_resize(backend, 1 << 20, NULL, 0));
    OK(bds_resize(backend, 1 << 20, NULL, BDS_RESIZE_SHRINK));
    OK(bds_backend_length(backend, &length));
    CHECK(length == 1 << 20);
    OK(bds_backend_unref(backend));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
