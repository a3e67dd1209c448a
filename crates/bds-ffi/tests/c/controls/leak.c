/* Drops texts of the library without bds_free: a leak checker must find them. */
#include <string.h>

#include "bds.h"

__attribute__((noinline)) static int drop_texts(bds_context context) {
    int failed = 0;
    for (int i = 0; i < 8; i++) {
        char *text = NULL;
        failed |= bds_query(context, "nodes", &text) < 0;
    }
    return failed;
}

int main(void) {
    bds_context context;
    char stack[4096];
    if (bds_context_create(NULL, &context) < 0 || drop_texts(context))
        return 0;
    memset(stack, 0, sizeof stack);
    (void)bds_context_unref(context);
    return stack[sizeof stack - 1];
}
