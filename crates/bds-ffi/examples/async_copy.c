/* Copies one disk to another through a queue and poll(2): many requests in flight, one thread.
 *
 * Each slot owns a buffer. A read that completes becomes a write from the same buffer; a write that
 * completes frees the slot for the next piece. */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bds.h"

#define SLOTS 16
#define PIECE (64u << 10)
#define LEN (16u << 20)

static char buffers[SLOTS][PIECE];

static void must(int result, const char *what) {
    if (result >= 0)
        return;
    fprintf(stderr, "%s: %s (%s)\n", what, bds_error_message(), bds_status_name(result));
    exit(1);
}

static bds_backend open_disk(bds_context context, const char *options) {
    bds_node node;
    bds_backend disk;
    bds_backend_options wanted = BDS_BACKEND_OPTIONS_INIT;
    wanted.flags = BDS_BACKEND_WRITABLE;
    must(bds_node_open(context, options, &node), "open");
    must(bds_backend_create_on(node, &wanted, &disk), "backend");
    must(bds_node_unref(node), "unref"); /* the backend keeps the node */
    return disk;
}

static void submit(bds_queue queue, bds_backend disk, uint32_t opcode, uint64_t offset, int slot) {
    bds_request request;
    memset(&request, 0, sizeof request);
    request.opcode = opcode;
    request.backend = disk;
    request.offset = offset;
    request.bytes = PIECE;
    request.buffer = buffers[slot];
    request.user_data = (uint64_t)slot | offset << 8 | (opcode == BDS_OP_WRITE ? 1ull << 7 : 0);
    must(bds_queue_submit(queue, &request, 1), "submit");
}

int main(void) {
    bds_context context;
    bds_backend source, target;
    bds_queue queue;
    bds_completion done[SLOTS];
    struct pollfd fd;
    uint64_t next = 0, copied = 0;

    must(bds_context_create(NULL, &context), "context");
    source = open_disk(context, "driver=mem,size=16M");
    target = open_disk(context, "driver=mem,size=16M");
    for (uint64_t at = 0; at < LEN; at += PIECE)
        must(bds_pwrite(source, &at, sizeof at, at, 0), "fill");

    must(bds_queue_create(context, NULL, &queue), "queue");
    fd.fd = bds_queue_fd(queue);
    fd.events = POLLIN;
    for (int slot = 0; slot < SLOTS; slot++, next += PIECE)
        submit(queue, source, BDS_OP_READ, next, slot);
    while (copied < LEN) {
        int taken;
        if (poll(&fd, 1, -1) < 0)
            continue; /* a signal */
        taken = bds_queue_poll(queue, done, SLOTS);
        must(taken, "poll");
        for (int i = 0; i < taken; i++) {
            int slot = (int)(done[i].user_data & 127);
            must((int)done[i].status, "request");
            if (!(done[i].user_data & 128)) {
                submit(queue, target, BDS_OP_WRITE, done[i].user_data >> 8, slot);
                continue;
            }
            copied += PIECE;
            if (next < LEN) {
                submit(queue, source, BDS_OP_READ, next, slot);
                next += PIECE;
            }
        }
    }
    for (uint64_t at = 0; at < LEN; at += PIECE) {
        uint64_t found = 1;
        must(bds_pread(target, &found, sizeof found, at, 0), "read back");
        if (found != at) {
            fprintf(stderr, "wrong bytes at %llu\n", (unsigned long long)at);
            return 1;
        }
    }
    printf("copied %u MiB\n", LEN >> 20);
    must(bds_queue_unref(queue), "unref");
    must(bds_backend_unref(source), "unref");
    must(bds_backend_unref(target), "unref");
    must(bds_context_unref(context), "unref");
    return 0;
}
