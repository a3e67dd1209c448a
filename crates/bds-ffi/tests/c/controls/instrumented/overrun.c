/* Has the library read past the end of the caller's memory: AddressSanitizer finds it only where
 * the library's own code is instrumented. */
#include <stdlib.h>

#include "bds.h"

int main(void) {
    bds_context context;
    bds_node node;
    bds_backend backend;
    char *bytes = (char *)malloc(512);
    if (bds_context_create(NULL, &context) < 0 ||
        bds_node_open(context, "driver=mem,size=64k", &node) < 0 ||
        bds_backend_create_on(node, NULL, &backend) < 0 || bytes == NULL)
        return 0;
    (void)!bds_pread(backend, bytes, 4096, 0, 0);
    free(bytes);
    return 0;
}
