/* Backs a disk up while a guest writes to it: the copy is the disk as it was at the start. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bds.h"

#define LEN (8u << 20)
#define BLOCK 4096u

static void must(int result, const char *what) {
    if (result >= 0)
        return;
    fprintf(stderr, "%s: %s (%s)\n", what, bds_error_message(), bds_status_name(result));
    exit(1);
}

static bds_node open_disk(bds_context context, const char *options) {
    bds_node node;
    must(bds_node_open(context, options, &node), options);
    return node;
}

static bds_backend writer(bds_node node) {
    bds_backend disk;
    bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
    options.flags = BDS_BACKEND_WRITABLE;
    must(bds_backend_create_on(node, &options, &disk), "backend");
    return disk;
}

int main(void) {
    static uint8_t block[BLOCK];
    bds_context context;
    bds_node disk, copy;
    bds_backend guest, reader;
    bds_job job;
    unsigned written = 0;

    must(bds_context_create(NULL, &context), "context");
    disk = open_disk(context, "driver=mem,node-name=disk,size=8M");
    copy = open_disk(context, "driver=mem,node-name=copy,size=8M");
    guest = writer(disk);
    memset(block, 1, sizeof block);
    for (uint64_t at = 0; at < LEN; at += BLOCK)
        must(bds_pwrite(guest, block, BLOCK, at, 0), "fill");

    must(bds_job_start(context, "backup",
                       "job-id=backup0,device=disk,target=copy,sync=full,speed=64M", &job),
         "start");
    /* The guest goes on. What it overwrites is copied first. */
    memset(block, 2, sizeof block);
    while (bds_job_wait(job, NULL, 0) < 0 && bds_error_status() == -ETIME) {
        must(bds_pwrite(guest, block, BLOCK, (uint64_t)written * 37 % (LEN / BLOCK) * BLOCK, 0),
             "guest write");
        written++;
    }
    must(bds_job_wait(job, NULL, -1), "backup");

    must(bds_backend_create_on(copy, NULL, &reader), "backend");
    for (uint64_t at = 0; at < LEN; at += BLOCK) {
        must(bds_pread(reader, block, BLOCK, at, 0), "read the copy");
        if (block[0] != 1 || memcmp(block, block + 1, BLOCK - 1) != 0) {
            fprintf(stderr, "the copy has a later write at %llu\n", (unsigned long long)at);
            return 1;
        }
    }
    printf("the copy is the disk as it was, %u guest writes later\n", written);
    must(bds_job_unref(job), "unref");
    must(bds_backend_unref(reader), "unref");
    must(bds_backend_unref(guest), "unref");
    must(bds_node_unref(copy), "unref");
    must(bds_node_unref(disk), "unref");
    must(bds_context_unref(context), "unref");
    return 0;
}
