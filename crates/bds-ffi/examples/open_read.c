/* Opens an image read-only and prints its first bytes.
 *
 *     open_read disk.qcow2
 *
 * Without an argument it makes an image first. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bds.h"

static void must(int result, const char *what) {
    if (result >= 0)
        return;
    fprintf(stderr, "%s: %s (%s)\n", what, bds_error_message(), bds_status_name(result));
    exit(1);
}

static const char *make_image(bds_context context) {
    static char path[4096];
    const char *dir = getenv("BDS_TEST_DIR");
    bds_node node;
    bds_backend disk;
    bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
    snprintf(path, sizeof path, "%s/open_read.qcow2", dir ? dir : ".");
    must(bds_image_create(context, path, "qcow2", "size=64M"), "create");
    must(bds_node_open_path(context, path, "qcow2", 0, &node), "open for writing");
    options.flags = BDS_BACKEND_WRITABLE;
    must(bds_backend_create_on(node, &options, &disk), "backend");
    must(bds_pwrite(disk, "hello from bds\n", 15, 0, 0), "write");
    must(bds_flush(disk), "flush");
    must(bds_backend_unref(disk), "unref");
    must(bds_node_close(node, NULL), "close"); /* and wait for it: the file is opened again */
    must(bds_node_unref(node), "unref");
    return path;
}

int main(int argc, char **argv) {
    bds_context context;
    bds_node node;
    bds_backend disk;
    char bytes[64], *facts;
    const char *path;

    must(bds_context_create(NULL, &context), "context");
    path = argc > 1 ? argv[1] : make_image(context);
    must(bds_node_open_path(context, path, NULL, BDS_OPEN_READ_ONLY | BDS_OPEN_PROBE, &node), path);
    must(bds_node_query(node, &facts), "query");
    printf("%s\n", facts);
    bds_free(facts);

    must(bds_backend_create_on(node, NULL, &disk), "backend");
    must(bds_pread(disk, bytes, sizeof bytes, 0, 0), "read");
    fwrite(bytes, 1, strnlen(bytes, sizeof bytes), stdout);

    must(bds_backend_unref(disk), "unref");
    must(bds_node_unref(node), "unref");
    must(bds_context_unref(context), "unref");
    return 0;
}
