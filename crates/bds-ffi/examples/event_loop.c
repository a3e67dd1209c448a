/* Event loops that serve many disks from two threads, while a third thread changes the graph below
 * them: snapshots that are streamed, migrations to other images, filters, drained sections.
 *
 *   cc event_loop.c $(pkg-config --cflags --libs bds) -pthread && ./a.out
 *
 * Each disk has a queue, each loop an epoll(7) descriptor with the queues of its disks. A slot of a
 * disk owns a part of it: it writes a stamp there, reads it back, and goes on. No change of the
 * graph may lose or repeat a completion, fail a request, or lose a stamp. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "bds.h"

#define LOOPS 2
#define DISKS 8
#define SLOTS 16
#define PIECE 4096u
#define LEN (2u << 20)
#define PIECES (LEN / PIECE)
/* Requests of a disk, and changes below all of them, after which the program ends. */
#define REQUESTS 2000
#define CHANGES 24

struct slot {
    uint64_t buffer[PIECE / sizeof(uint64_t)];
    uint32_t piece;
    int is_writing;
};

struct disk {
    bds_backend guest;
    bds_queue queue;
    struct slot slots[SLOTS];
    uint64_t stamps[PIECES]; /* what each piece holds */
    uint64_t last_stamp;
    int in_flight;
    unsigned long completed;
    int images; /* that it had so far: they number its files and nodes */
};

static struct disk disks[DISKS];
static bds_context context;
static atomic_int changes_are_over;

static void must(int result, const char *what) {
    if (result >= 0)
        return;
    fprintf(stderr, "%s: %s (%s)\n", what, bds_error_message(), bds_status_name(result));
    exit(1);
}

/* ---- the loops ---- */

static void submit(struct disk *disk, int slot, uint32_t opcode) {
    struct slot *one = &disk->slots[slot];
    bds_request request;
    memset(&request, 0, sizeof request);
    request.opcode = opcode;
    request.backend = disk->guest;
    request.user_data = (uint64_t)slot;
    if (opcode != BDS_OP_FLUSH) {
        request.offset = (uint64_t)one->piece * PIECE;
        request.bytes = PIECE;
        request.buffer = one->buffer;
    }
    must(bds_queue_submit(disk->queue, &request, 1), "submit");
    disk->in_flight++;
}

/* The slot's next piece gets a new stamp. */
static void write_next(struct disk *disk, int slot) {
    struct slot *one = &disk->slots[slot];
    uint64_t stamp = ++disk->last_stamp;
    one->is_writing = 1;
    one->piece = (one->piece + SLOTS) % PIECES;
    for (size_t i = 0; i < PIECE / sizeof stamp; i++)
        one->buffer[i] = stamp;
    disk->stamps[one->piece] = stamp;
    submit(disk, slot, BDS_OP_WRITE);
}

static void check_stamp(const struct disk *disk, uint32_t piece, const uint64_t *buffer) {
    for (size_t i = 0; i < PIECE / sizeof *buffer; i++)
        if (buffer[i] != disk->stamps[piece]) {
            fprintf(stderr, "disk %d, piece %u: stamp %llu, not %llu\n", (int)(disk - disks),
                    (unsigned)piece, (unsigned long long)buffer[i],
                    (unsigned long long)disk->stamps[piece]);
            exit(1);
        }
}

static void completed(struct disk *disk, const bds_completion *done) {
    int slot = (int)done->user_data;
    struct slot *one = &disk->slots[slot];
    must((int)done->status, "request");
    disk->in_flight--;
    disk->completed++;
    if (one->is_writing) {
        one->is_writing = 0;
        memset(one->buffer, 0, sizeof one->buffer);
        submit(disk, slot, BDS_OP_READ);
        return;
    }
    check_stamp(disk, one->piece, one->buffer);
    if (!atomic_load(&changes_are_over) || disk->completed < REQUESTS)
        write_next(disk, slot);
}

/* Serves disks number, number + LOOPS, … until the changes are over and its requests are done. */
static void *serve(void *argument) {
    int number = (int)(intptr_t)argument, epoll = epoll_create1(EPOLL_CLOEXEC), busy = 0;
    must(epoll, "epoll_create1");
    for (int i = number; i < DISKS; i += LOOPS) {
        struct epoll_event event;
        memset(&event, 0, sizeof event);
        event.events = EPOLLIN;
        event.data.ptr = &disks[i];
        must(epoll_ctl(epoll, EPOLL_CTL_ADD, bds_queue_fd(disks[i].queue), &event), "epoll_ctl");
        for (int slot = 0; slot < SLOTS; slot++) {
            disks[i].slots[slot].piece = (uint32_t)slot;
            write_next(&disks[i], slot);
        }
        busy++;
    }
    while (busy > 0) {
        struct epoll_event ready[DISKS];
        int count = epoll_wait(epoll, ready, DISKS, -1);
        for (int i = 0; i < count; i++) {
            struct disk *disk = ready[i].data.ptr;
            bds_completion done[SLOTS];
            int taken = bds_queue_poll(disk->queue, done, SLOTS);
            must(taken, "poll");
            for (int j = 0; j < taken; j++)
                completed(disk, &done[j]);
            if (taken > 0 && disk->in_flight == 0)
                busy--;
        }
    }
    close(epoll);
    return NULL;
}

/* ---- the graph ---- */

/* Makes a new image for a disk and opens it; the node has the file's name. */
static bds_node new_image(struct disk *disk, char name[32]) {
    char options[128];
    bds_node node;
    snprintf(name, 32, "disk%d-%d", (int)(disk - disks), disk->images++);
    snprintf(options, sizeof options, "size=%u", LEN);
    must(bds_image_create(context, name, "qcow2", options), "create");
    snprintf(options, sizeof options,
             "driver=qcow2,node-name=%s,file.driver=file,file.filename=%s", name, name);
    must(bds_node_open(context, options, &node), "open");
    return node;
}

/* The disk's node, and its name. */
static bds_node medium(struct disk *disk, char name[32]) {
    bds_node node;
    char *text;
    must(bds_backend_node(disk->guest, &node), "medium");
    must(bds_node_name(node, &text), "name");
    snprintf(name, 32, "%s", text);
    bds_free(text);
    return node;
}

static void run_job(const char *type, const char *options, int completes) {
    bds_job job;
    must(bds_job_start(context, type, options, &job), options);
    if (completes) {
        must(bds_job_wait(job, "ready", -1), "ready");
        must(bds_job_complete(job), "complete");
    }
    must(bds_job_wait(job, NULL, -1), options);
    must(bds_job_unref(job), "unref");
}

/* Two disks get an overlay in the same moment; then all data is pulled into the overlays, and the
 * images below are closed and removed. */
static void snapshot(struct disk *const pair[2]) {
    char old[2][32], name[2][32], options[128];
    bds_node below[2], overlay[2];
    bds_change change;
    must(bds_change_create(context, &change), "change");
    for (int i = 0; i < 2; i++) {
        below[i] = medium(pair[i], old[i]);
        overlay[i] = new_image(pair[i], name[i]);
        must(bds_change_append(change, below[i], overlay[i]), "append");
    }
    must(bds_change_commit(change, NULL), "commit");
    must(bds_change_unref(change), "unref");
    for (int i = 0; i < 2; i++) {
        snprintf(options, sizeof options, "job-id=stream%d,device=%s", i, name[i]);
        run_job("stream", options, 0);
        /* The drive holds the overlay; nothing but this handle holds the image that was below. */
        (void)bds_node_unref(overlay[i]);
        must(bds_node_close(below[i], NULL), "close");
        must(bds_node_unref(below[i]), "unref");
        unlink(old[i]);
    }
}

/* The disk moves to another image while it is written. */
static void migrate(struct disk *disk) {
    char old[32], name[32], options[160];
    bds_node from = medium(disk, old), to = new_image(disk, name);
    snprintf(options, sizeof options,
             "job-id=mirror,device=%s,target=%s,copy-mode=write-blocking,target-is-zero=on", old,
             name);
    run_job("mirror", options, 1);
    (void)bds_node_unref(to);
    must(bds_node_close(from, NULL), "close");
    must(bds_node_unref(from), "unref");
    unlink(old);
}

/* A filter goes between drive and image, and out again with the change that closes it. */
static void filter(struct disk *disk) {
    char name[32], options[128];
    bds_node node = medium(disk, name), above;
    bds_change change;
    snprintf(options, sizeof options, "driver=throttle,node-name=limit,limits.iops-total=1000000,file=%s",
             name);
    must(bds_node_open(context, options, &above), "open");
    must(bds_change_create(context, &change), "change");
    must(bds_change_insert_filter(change, node, above), "insert");
    must(bds_change_commit(change, NULL), "commit");
    must(bds_change_drop_filter(change, above), "drop");
    must(bds_change_remove(change, above), "remove");
    must(bds_change_commit(change, NULL), "commit");
    must(bds_change_unref(change), "unref");
    must(bds_node_unref(above), "unref");
    (void)bds_node_unref(node);
}

/* No request is in flight for a while: what happens in a drained section is of one moment. */
static void section(void) {
    bds_section all;
    char *nodes;
    must(bds_graph_drain_all(context, &all), "drain");
    must(bds_query(context, "graph", &nodes), "query");
    bds_free(nodes);
    must(bds_graph_drain_end(all), "end");
}

static void change_graph(int number) {
    struct disk *pair[2] = {&disks[number % DISKS], &disks[(number + 1) % DISKS]};
    switch (number % 4) {
    case 0:
        snapshot(pair);
        break;
    case 1:
        filter(pair[0]);
        break;
    case 2:
        migrate(pair[0]);
        break;
    default:
        section();
    }
}

/* ---- the program ---- */

static void open_disk(struct disk *disk) {
    char name[32];
    bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
    bds_node node = new_image(disk, name);
    options.flags = BDS_BACKEND_WRITABLE;
    must(bds_backend_create_on(node, &options, &disk->guest), "backend");
    must(bds_node_unref(node), "unref"); /* the backend keeps the node */
    must(bds_queue_create(context, NULL, &disk->queue), "queue");
}

/* Every stamp is where it was written, in an image that the process closes in order. */
static void close_disk(struct disk *disk) {
    char name[32];
    bds_node node = medium(disk, name);
    uint64_t buffer[PIECE / sizeof(uint64_t)];
    for (uint32_t piece = 0; piece < PIECES; piece++) {
        must(bds_pread(disk->guest, buffer, PIECE, (uint64_t)piece * PIECE, 0), "read");
        check_stamp(disk, piece, buffer);
    }
    must(bds_queue_unref(disk->queue), "unref");
    must(bds_backend_unref(disk->guest), "unref");
    must(bds_node_close(node, NULL), "close");
    must(bds_node_unref(node), "unref");
    unlink(name);
}

int main(void) {
    bds_context_options options = BDS_CONTEXT_OPTIONS_INIT;
    pthread_t loops[LOOPS];
    unsigned long requests = 0;

    options.flags = BDS_CONTEXT_TRUST_REFERENCES; /* images of our own */
    must(bds_context_create(&options, &context), "context");
    for (int i = 0; i < DISKS; i++)
        open_disk(&disks[i]);
    for (int i = 0; i < LOOPS; i++)
        if (pthread_create(&loops[i], NULL, serve, (void *)(intptr_t)i) != 0)
            return 1;
    for (int number = 0; number < CHANGES; number++)
        change_graph(number);
    atomic_store(&changes_are_over, 1);
    for (int i = 0; i < LOOPS; i++)
        if (pthread_join(loops[i], NULL) != 0)
            return 1;
    for (int i = 0; i < DISKS; i++) {
        requests += disks[i].completed;
        close_disk(&disks[i]);
    }
    printf("%lu requests by %d loops, %d changes of the graph\n", requests, LOOPS, CHANGES);
    must(bds_context_shutdown(context, NULL), "shutdown");
    must(bds_context_unref(context), "unref");
    return 0;
}
