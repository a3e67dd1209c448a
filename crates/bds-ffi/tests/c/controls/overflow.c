/* Writes past the end of a text of the library: a memory checker must find it. */
#include <string.h>

#include "bds.h"

int main(void) {
    bds_context context;
    char *text;
    volatile size_t past;
    if (bds_context_create(NULL, &context) < 0 || bds_query(context, "nodes", &text) < 0)
        return 0;
    past = strlen(text) + 1;
    text[past] = 'x';
    bds_free(text);
    return 0;
}
