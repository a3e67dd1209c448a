/* Loads the library, uses it, and closes it, twenty times: FILE. Its threads outlive each close. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "bds.h"

#define NEED(condition)                                                                   \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%d: %s\n", __LINE__, #condition);                            \
            return 1;                                                                     \
        }                                                                                 \
    } while (0)

/* ISO C has no conversion from object to function pointers; POSIX has. */
#define LOAD(function, library) memcpy(&(function), &(void *){dlsym(library, #function + 4)}, 8)

int main(int argc, char **argv) {
    NEED(argc == 2);
    for (int round = 0; round < 20; round++) {
        void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        int (*the_bds_context_create)(const bds_context_options *, bds_context *);
        int (*the_bds_node_open)(bds_context, const char *, bds_node *);
        int (*the_bds_node_unref)(bds_node);
        int (*the_bds_context_unref)(bds_context);
        bds_context context;
        bds_node node;
        if (library == NULL)
            fprintf(stderr, "%s\n", dlerror());
        NEED(library != NULL);
        LOAD(the_bds_context_create, library);
        LOAD(the_bds_node_open, library);
        LOAD(the_bds_node_unref, library);
        LOAD(the_bds_context_unref, library);
        NEED(the_bds_context_create(NULL, &context) == 0);
        NEED(the_bds_node_open(context, "driver=mem,size=1M", &node) == 0);
        NEED(the_bds_node_unref(node) == 0);
        NEED(the_bds_node_unref(node) == BDS_ERR_STALE);
        NEED(the_bds_context_unref(context) >= 0);
        NEED(dlclose(library) == 0);
    }
    return 0;
}
