/* Writes into memory that the library fills on another thread: ThreadSanitizer finds it only where
 * the library's own code is instrumented. */
#include <pthread.h>

#include "bds.h"

#define ROUNDS 1000

static bds_backend backend;
static volatile char bytes[512];

static void *reads(void *argument) {
    (void)argument;
    for (int i = 0; i < ROUNDS; i++)
        (void)!bds_pread(backend, (void *)bytes, sizeof bytes, 0, 0);
    return NULL;
}

int main(void) {
    bds_context context;
    bds_node node;
    pthread_t thread;
    if (bds_context_create(NULL, &context) < 0 ||
        bds_node_open(context, "driver=mem,size=64k", &node) < 0 ||
        bds_backend_create_on(node, NULL, &backend) < 0 ||
        pthread_create(&thread, NULL, reads, NULL) != 0)
        return 0;
    for (int i = 0; i < ROUNDS; i++)
        bytes[i % 512] = 1;
    (void)pthread_join(thread, NULL);
    return 0;
}
