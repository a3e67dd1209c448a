/* Blocking requests on a qcow2 image: data, zeros, discard, flush, vectors, resize, status. */
#include "check.h"

static const bds_node no_node = {0};

int main(void) {
    char path[512], a[4096], b[4096], *json;
    bds_context context = new_context();
    bds_node node;
    bds_backend backend;
    bds_extent extents[8];
    size_t count;
    uint64_t length;
    struct iovec parts[2];

    in_dir(path, sizeof path, "disk.qcow2");
    OK(bds_image_create(context, path, "qcow2", "size=16M"));
    OK(bds_node_open_path(context, path, "qcow2", BDS_OPEN_UNMAP, &node));
    backend = new_writer(node);

    memset(a, 0x5a, sizeof a);
    OK(bds_pwrite(backend, a, sizeof a, 65536, 0));
    OK(bds_pwrite(backend, a, 512, 1 << 20, BDS_REQ_FUA));
    OK(bds_flush(backend));
    memset(b, 0, sizeof b);
    OK(bds_pread(backend, b, sizeof b, 65536, 0));
    CHECK(memcmp(a, b, sizeof a) == 0);

    /* Two segments, one of them unaligned. */
    parts[0].iov_base = b;
    parts[0].iov_len = 100;
    parts[1].iov_base = b + 1000;
    parts[1].iov_len = 412;
    memset(b, 0, sizeof b);
    OK(bds_preadv(backend, parts, 2, 65536, 0));
    CHECK(b[99] == 0x5a && b[100] == 0 && b[999] == 0 && b[1000] == 0x5a && b[1411] == 0x5a);
    OK(bds_pwritev(backend, parts, 2, 2 << 20, 0));

    OK(bds_write_zeroes(backend, 65536, 1024, BDS_REQ_MAY_UNMAP));
    OK(bds_pread(backend, b, 2048, 65536, 0));
    CHECK(b[0] == 0 && b[1023] == 0 && b[1024] == 0x5a);
    OK(bds_discard(backend, 2 << 20, 65536, 0));

    OK(bds_block_status(backend, no_node, 0, 131072, extents, 8, &count));
    CHECK(count >= 2 && extents[0].offset == 0 && extents[0].bytes == 65536);
    CHECK(extents[0].flags & BDS_EXTENT_ZERO);
    CHECK(extents[1].flags & BDS_EXTENT_DATA);
    CHECK(extents[1].flags & BDS_EXTENT_OFFSET_VALID);
    OK(bds_block_status(backend, no_node, 0, 131072, extents, 1, &count));
    CHECK(count == 1);
    OK(bds_block_status(backend, no_node, 0, 131072, NULL, 0, &count));
    CHECK(count == 0);

    /* Errors come as codes, and change nothing. */
    IS(BDS_ERR_RANGE, bds_pread(backend, b, 4096, 16 << 20, 0));
    IS(BDS_ERR_RANGE, bds_pwrite(backend, b, 4096, UINT64_MAX - 100, 0));
    IS(BDS_ERR_ARGUMENT, bds_pread(backend, NULL, 4096, 0, 0));
    OK(bds_pread(backend, NULL, 0, 0, 0));
    IS(BDS_ERR_ARGUMENT, bds_pread(backend, b, SIZE_MAX, 0, 0));
    IS(BDS_ERR_VERSION, bds_pread(backend, b, 512, 0, 1));
    IS(BDS_ERR_VERSION, bds_pwrite(backend, b, 512, 0, 1u << 30));
    IS(BDS_ERR_ARGUMENT, bds_preadv(backend, NULL, 2, 0, 0));
    IS(BDS_ERR_ARGUMENT, bds_preadv(backend, parts, 2000, 0, 0));

    IS(BDS_ERR_OPTION, bds_resize(backend, 8 << 20, NULL, 0));
    OK(bds_resize(backend, 32 << 20, "metadata", 0));
    OK(bds_backend_length(backend, &length));
    CHECK(length == 32 << 20);
    IS(BDS_ERR_VERSION, bds_resize(backend, 8 << 20, NULL, 2));
    IS(BDS_ERR_OPTION, bds_resize(backend, 33 << 20, "much", 0));

    /* A compressed cluster. */
    {
        static char cluster[65536];
        memset(cluster, 7, sizeof cluster);
        OK(bds_pwrite(backend, cluster, sizeof cluster, 4 << 20, BDS_REQ_COMPRESSED));
        OK(bds_pread(backend, b, sizeof b, 4 << 20, 0));
        CHECK(b[0] == 7 && b[4095] == 7);
        IS(BDS_ERR_ARGUMENT, bds_pwrite(backend, cluster, sizeof cluster, 0,
                                        BDS_REQ_COMPRESSED | BDS_REQ_FUA));
    }
    OK(bds_backend_stats(backend, &json));
    CHECK(has(json, "rd_bytes"));
    OK(bds_backend_unref(backend));
    OK(bds_node_close(node, &json));
    CHECK(has(json, "qcow2"));
    IS(BDS_ERR_STATE, bds_node_close(node, NULL));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
