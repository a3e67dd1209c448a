/* Four threads use the library at random at once: shared and own handles, released by any thread;
 * errors stay with their thread. */
#include <pthread.h>

#include "check.h"

#define THREADS 4
#define ROUNDS 400

static bds_context context;
static bds_node shared;
static bds_backend disk;

static void *work(void *argument) {
    unsigned seed = *(unsigned *)argument;
    char bytes[512];
    for (int i = 0; i < ROUNDS; i++) {
        bds_node mine = {0};
        bds_queue queue;
        bds_completion done[1];
        bds_request request;
        uint64_t id;
        seed = seed * 1664525u + 1013904223u;
        switch (seed >> 28) {
        case 0:
        case 1:
            OK(bds_node_ref(shared, &mine));
            OK(bds_node_id(mine, &id));
            IS(BDS_STILL_REFERENCED, bds_node_unref(mine));
            IS(BDS_ERR_STALE, bds_node_unref(mine));
            CHECK(bds_error_status() == BDS_ERR_STALE && *bds_error_message());
            break;
        case 2:
            OK(bds_node_open(context, "driver=mem,size=64k", &mine));
            OK(bds_node_unref(mine));
            break;
        case 3: {
            bds_context own;
            OK(bds_context_create(NULL, &own));
            OK(bds_node_open(own, "driver=mem,size=64k", &mine));
            OK(bds_node_unref(mine));
            OK(bds_context_unref(own));
            break;
        }
        case 4:
            OK(bds_queue_create(context, NULL, &queue));
            memset(&request, 0, sizeof request);
            request.opcode = BDS_OP_READ;
            request.backend = disk;
            request.bytes = sizeof bytes;
            request.buffer = bytes;
            IS(1, bds_queue_submit(queue, &request, 1));
            IS(1, bds_queue_wait(queue, done, 1, 1, -1));
            OK((int)done[0].status);
            OK(bds_queue_unref(queue));
            break;
        case 5:
            IS(BDS_ERR_NOT_FOUND, bds_node_find(context, "nothing", &mine));
            break;
        default:
            OK(bds_pwrite(disk, bytes, sizeof bytes, (seed >> 8) % 2000 * 512, 0));
            OK(bds_pread(disk, bytes, sizeof bytes, (seed >> 8) % 2000 * 512, 0));
        }
    }
    return NULL;
}

int main(void) {
    pthread_t threads[THREADS];
    pthread_attr_t attributes;
    unsigned seeds[THREADS] = {1, 22, 333, 4444};
    context = new_context();
    OK(bds_node_open(context, "driver=mem,size=1M", &shared));
    disk = new_writer(shared);
    CHECK(pthread_attr_init(&attributes) == 0);
    /* What the header promises to be enough. */
    CHECK(pthread_attr_setstacksize(&attributes, 128 << 10) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], &attributes, work, &seeds[i]) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    OK(bds_backend_unref(disk));
    /* Nodes of the threads may still be closing, which computes the permissions of others anew and
     * looks at this one. */
    int last = bds_node_unref(shared);
    CHECK(last == BDS_OK || last == BDS_STILL_REFERENCED);
    IS(BDS_ERR_STALE, bds_node_unref(shared));
    OK(bds_context_unref(context));
    return 0;
}
