/* Four threads make and end contexts as fast as they can, with nodes, queues and I/O threads in
 * them; threads end with a failure of their own, and use the library while they end. */
#include <pthread.h>

#include "check.h"

#define THREADS 4
#define ROUNDS 100
#define SHORT_LIVES 100

static void *storm(void *argument) {
    unsigned seed = *(unsigned *)argument;
    char bytes[512];
    for (int i = 0; i < ROUNDS; i++) {
        bds_context context = new_context();
        bds_node node = new_disk(context, "driver=mem,size=64k,node-name=disk");
        bds_backend backend = new_writer(node);
        bds_iothread thread;
        seed = seed * 1664525u + 1013904223u;
        memset(bytes, (int)(seed >> 24), sizeof bytes);
        OK(bds_pwrite(backend, bytes, sizeof bytes, 0, 0));
        if (seed >> 30 == 0) {
            bds_queue_options options = BDS_QUEUE_OPTIONS_INIT;
            bds_queue queue;
            OK(bds_iothread_create(context, "storm", &thread));
            options.iothread = thread;
            OK(bds_queue_create(context, &options, &queue));
            IS(BDS_STILL_REFERENCED, bds_iothread_unref(thread));
            OK(bds_queue_unref(queue));
        }
        if (seed >> 31) {
            OK(bds_backend_unref(backend));
            OK(bds_node_close(node, NULL));
            OK(bds_node_unref(node));
            OK(bds_context_unref(context));
        } else { /* the context first: what is in it keeps it */
            IS(BDS_STILL_REFERENCED, bds_context_unref(context));
            IS(BDS_ERR_STALE, bds_context_unref(context));
            IS(BDS_STILL_REFERENCED, bds_node_unref(node));
            OK(bds_backend_unref(backend));
        }
    }
    return NULL;
}

static pthread_key_t key;
static bds_context shared;

/* Runs while its thread ends, maybe behind the library's own destructors. */
static void at_thread_end(void *value) {
    bds_node node;
    (void)value;
    if (bds_node_find(shared, "nothing", &node) != BDS_ERR_NOT_FOUND)
        abort();
    (void)bds_error_message();
}

static void *fails(void *argument) {
    bds_node node;
    (void)argument;
    CHECK(bds_error_status() == 0 && *bds_error_message() == 0);
    CHECK(pthread_setspecific(key, &key) == 0);
    IS(BDS_ERR_NOT_FOUND, bds_node_find(shared, "nothing", &node));
    CHECK(bds_error_status() == BDS_ERR_NOT_FOUND);
    return NULL;
}

int main(void) {
    pthread_t threads[THREADS];
    unsigned seeds[THREADS] = {11, 222, 3333, 44444};
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, storm, &seeds[i]) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);

    shared = new_context();
    CHECK(pthread_key_create(&key, at_thread_end) == 0);
    for (int i = 0; i < SHORT_LIVES; i++) {
        CHECK(pthread_create(&threads[0], NULL, fails, NULL) == 0);
        CHECK(pthread_join(threads[0], NULL) == 0);
    }
    CHECK(bds_error_status() == 0);
    OK(bds_context_unref(shared));
    return 0;
}
