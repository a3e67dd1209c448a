/* Two threads write to a variable without a lock: ThreadSanitizer has to say so. */
#include <pthread.h>

#include "check.h"

static bds_context context;
static int rounds;

static void *work(void *unused) {
    (void)unused;
    for (int i = 0; i < 1000; i++) {
        bds_context mine;
        OK(bds_context_ref(context, &mine));
        rounds++;
        IS(BDS_STILL_REFERENCED, bds_context_unref(mine));
    }
    return NULL;
}

int main(void) {
    pthread_t other;
    context = new_context();
    CHECK(pthread_create(&other, NULL, work, NULL) == 0);
    work(NULL);
    CHECK(pthread_join(other, NULL) == 0);
    OK(bds_context_unref(context));
    return 0;
}
