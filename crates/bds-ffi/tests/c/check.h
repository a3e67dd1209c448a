/* Checks of the C suite: a failed one prints its line, the code and the library's message. */
#ifndef CHECK_H
#define CHECK_H
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bds.h"

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, \
                    bds_error_message());                                                 \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

/* The call returns this code. */
#define IS(wanted, call)                                                                  \
    do {                                                                                  \
        int found_ = (call);                                                              \
        if (found_ != (int)(wanted)) {                                                    \
            fprintf(stderr, "%s:%d: %s\n  is %d (%s), not %s\n  last error: %s\n", __FILE__, \
                    __LINE__, #call, found_, bds_status_name(found_), #wanted,             \
                    bds_error_message());                                                 \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

#define OK(call) IS(BDS_OK, call)

static inline bds_context new_context(void) {
    bds_context context;
    OK(bds_context_create(NULL, &context));
    return context;
}

/* A node in memory. */
static inline bds_node new_disk(bds_context context, const char *options) {
    bds_node node;
    OK(bds_node_open(context, options, &node));
    return node;
}

static inline bds_backend new_writer(bds_node node) {
    bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
    bds_backend backend;
    options.flags = BDS_BACKEND_WRITABLE;
    OK(bds_backend_create_on(node, &options, &backend));
    return backend;
}

/* The directory of this run, for files. */
static inline const char *in_dir(char *place, size_t size, const char *name) {
    const char *dir = getenv("BDS_TEST_DIR");
    CHECK(dir != NULL);
    CHECK((size_t)snprintf(place, size, "%s/%s", dir, name) < size);
    return place;
}

/* Whether JSON (or any text) from the library contains a part; frees it. */
static inline int has(char *text, const char *part) {
    int found = strstr(text, part) != NULL;
    if (!found)
        fprintf(stderr, "no '%s' in: %s\n", part, text);
    bds_free(text);
    return found;
}
#endif
