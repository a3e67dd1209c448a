/* Block status through a queue, and a queue that leaves all work to its thread. */
#include "check.h"

int main(void) {
    char path[512], options[1024], data[65536], *json;
    bds_context context = new_context();
    bds_node base = new_disk(context, "driver=mem,node-name=base,size=1M"), top;
    bds_backend backend, below;
    bds_queue_options queue_options = BDS_QUEUE_OPTIONS_INIT;
    bds_queue queue, offload;
    bds_memory memory;
    bds_request request;
    bds_completion done;
    bds_extent extents[8], same[8];
    size_t count;

    in_dir(path, sizeof path, "top.qcow2");
    OK(bds_image_create(context, path, "qcow2", "size=1M"));
    snprintf(options, sizeof options,
             "driver=qcow2,node-name=top,file.driver=file,file.filename=%s,backing=base", path);
    top = new_disk(context, options);
    backend = new_writer(top);
    below = new_writer(base);
    memset(data, 3, sizeof data);
    OK(bds_pwrite(backend, data, sizeof data, 131072, 0));
    OK(bds_pwrite(below, data, sizeof data, 0, 0));
    OK(bds_queue_create(context, NULL, &queue));

    memset(&request, 0, sizeof request);
    request.opcode = BDS_OP_BLOCK_STATUS;
    request.backend = backend;
    request.bytes = 1 << 20;
    request.buffer = extents;
    request.iovcnt = 8;
    request.user_data = 5;
    IS(1, bds_queue_submit(queue, &request, 1));
    IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
    OK(done.status);
    OK(bds_block_status(backend, request.base, 0, 1 << 20, same, 8, &count));
    CHECK(done.user_data == 5 && done.value == count && count > 2);
    CHECK(memcmp(extents, same, count * sizeof *same) == 0);

    /* Only the layers above 'base', and fewer extents than there are. */
    request.base = base;
    request.iovcnt = 1;
    memset(extents, 0xff, sizeof extents);
    IS(1, bds_queue_submit(queue, &request, 1));
    IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
    CHECK(done.value == 1 && extents[0].offset == 0 && extents[0].bytes == 131072);
    CHECK((extents[0].flags & BDS_EXTENT_ALLOCATED) == 0 && extents[1].bytes == UINT64_MAX);

    /* Into registered memory; what lies outside is refused. */
    OK(bds_memory_register(extents, sizeof *extents, &memory));
    request.memory = memory;
    IS(1, bds_queue_submit(queue, &request, 1));
    IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
    OK(done.status);
    request.iovcnt = 2;
    IS(BDS_ERR_RANGE, bds_queue_submit(queue, &request, 1));
    request.memory.raw = 0;
    OK(bds_memory_unref(memory));
    request.iovcnt = 1 << 20;
    IS(BDS_ERR_ARGUMENT, bds_queue_submit(queue, &request, 1));
    request.iovcnt = 8;
    request.flags = BDS_REQ_FUA;
    IS(BDS_ERR_VERSION, bds_queue_submit(queue, &request, 1));
    request.flags = 0;
    request.opcode = BDS_OP_FLUSH;
    IS(BDS_ERR_ARGUMENT, bds_queue_submit(queue, &request, 1));
    request.opcode = BDS_OP_BLOCK_STATUS;
    request.base.raw = backend.raw;
    IS(BDS_ERR_KIND, bds_queue_submit(queue, &request, 1));
    request.base.raw = 0;
    request.offset = 2 << 20;
    IS(1, bds_queue_submit(queue, &request, 1));
    IS(1, bds_queue_wait(queue, &done, 1, 1, -1));
    OK(done.status);
    CHECK(done.value == 0); /* there is nothing past the end */

    /* Memory has nothing to wait for: the submission does the read, if it may. */
    memset(&request, 0, sizeof request);
    request.opcode = BDS_OP_READ;
    request.backend = below;
    request.buffer = data;
    request.bytes = 4096;
    memset(data, 0, 4096);
    IS(1, bds_queue_submit(queue, &request, 1));
    CHECK(data[4095] == 3);
    IS(1, bds_queue_poll(queue, &done, 1));
    queue_options.flags = BDS_QUEUE_OFFLOAD;
    OK(bds_queue_create(context, &queue_options, &offload));
    memset(data, 0, 4096);
    IS(1, bds_queue_submit(offload, &request, 1));
    IS(1, bds_queue_wait(offload, &done, 1, 1, -1));
    OK(done.status);
    CHECK(data[4095] == 3);
    queue_options.flags = 1u << 31;
    IS(BDS_ERR_VERSION, bds_queue_create(context, &queue_options, &offload));

    /* Persistent bitmaps are stored when a change says so. */
    {
        bds_change change;
        OK(bds_bitmap_add(top, "kept", 0, BDS_BITMAP_PERSISTENT));
        OK(bds_pwrite(backend, data, 512, 0, 0));
        OK(bds_change_create(context, &change));
        OK(bds_change_store_bitmaps(change, top));
        OK(bds_change_commit(change, &json));
        CHECK(strstr(json, "bitmaps-not-logged") != NULL);
        CHECK(strstr(json, "not-flushed") != NULL);
        CHECK(has(json, "stored-bitmaps-left"));
        OK(bds_image_info(context, path, "qcow2", 0, &json));
        CHECK(has(json, "kept"));
        OK(bds_change_unref(change));
    }
    (void)bds_queue_unref(queue);
    (void)bds_backend_unref(backend);
    (void)bds_backend_unref(below);
    OK(bds_node_close(top, NULL));
    OK(bds_node_unref(top));
    OK(bds_node_unref(base));
    (void)bds_context_unref(context);
    return 0;
}
