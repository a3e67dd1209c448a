/* A full backup, then an increment of what a bitmap recorded, into an overlay of the full one. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bds.h"

static void must(int result, const char *what) {
    if (result >= 0)
        return;
    fprintf(stderr, "%s: %s (%s)\n", what, bds_error_message(), bds_status_name(result));
    exit(1);
}

static char *in_dir(const char *name) {
    static char places[4][4096];
    static int next;
    const char *dir = getenv("BDS_TEST_DIR");
    char *place = places[next++ % 4];
    snprintf(place, sizeof places[0], "%s/%s", dir ? dir : ".", name);
    return place;
}

static void run_job(bds_context context, const char *type, const char *options) {
    bds_job job;
    must(bds_job_start(context, type, options, &job), options);
    must(bds_job_wait(job, NULL, -1), options);
    must(bds_job_unref(job), "unref");
}

static bds_node open_image(bds_context context, const char *name, const char *node_name) {
    char options[8192];
    bds_node node;
    snprintf(options, sizeof options, "driver=qcow2,node-name=%s,file.driver=file,file.filename=%s",
             node_name, in_dir(name));
    must(bds_node_open(context, options, &node), options);
    return node;
}

int main(void) {
    static uint8_t block[65536];
    bds_context context;
    bds_context_options trusting = BDS_CONTEXT_OPTIONS_INIT;
    bds_node disk, full, increment;
    bds_backend guest, reader;
    bds_backend_options writing = BDS_BACKEND_OPTIONS_INIT;
    uint64_t dirty;

    /* The increment names the full backup as its backing file. */
    trusting.flags = BDS_CONTEXT_SAME_DIRECTORY;
    must(bds_context_create(&trusting, &context), "context");
    must(bds_image_create(context, in_dir("disk.qcow2"), "qcow2", "size=16M"), "create");
    must(bds_image_create(context, in_dir("full.qcow2"), "qcow2", "size=16M"), "create");
    disk = open_image(context, "disk.qcow2", "disk");
    full = open_image(context, "full.qcow2", "full");
    writing.flags = BDS_BACKEND_WRITABLE;
    must(bds_backend_create_on(disk, &writing, &guest), "backend");
    memset(block, 1, sizeof block);
    must(bds_pwrite(guest, block, sizeof block, 0, 0), "write");
    must(bds_pwrite(guest, block, sizeof block, 8 << 20, 0), "write");

    must(bds_bitmap_add(disk, "since-full", 0, BDS_BITMAP_PERSISTENT), "bitmap");
    run_job(context, "backup", "job-id=full,device=disk,target=full,sync=full");
    must(bds_node_close(full, NULL), "close"); /* and wait for it: the increment opens it */
    must(bds_node_unref(full), "unref");

    memset(block, 2, sizeof block);
    must(bds_pwrite(guest, block, sizeof block, 8 << 20, 0), "write");
    must(bds_bitmap_count(disk, "since-full", &dirty), "count");
    printf("%llu bytes have changed\n", (unsigned long long)dirty);

    must(bds_image_create(context, in_dir("increment.qcow2"), "qcow2",
                          "size=16M,backing_file=full.qcow2,backing_fmt=qcow2"),
         "create");
    increment = open_image(context, "increment.qcow2", "increment");
    run_job(context, "backup",
            "job-id=increment,device=disk,target=increment,sync=incremental,bitmap=since-full");

    /* Full and increment together show the disk. */
    must(bds_backend_create_on(increment, NULL, &reader), "backend");
    must(bds_pread(reader, block, 1, 0, 0), "read");
    must(bds_pread(reader, block + 1, 1, 8 << 20, 0), "read");
    if (block[0] != 1 || block[1] != 2) {
        fprintf(stderr, "the increment shows %d and %d\n", block[0], block[1]);
        return 1;
    }
    must(bds_backend_unref(reader), "unref");
    must(bds_backend_unref(guest), "unref");
    must(bds_node_unref(increment), "unref");
    must(bds_node_unref(disk), "unref");
    must(bds_context_unref(context), "unref");
    printf("the increment on the full backup shows the disk\n");
    return 0;
}
