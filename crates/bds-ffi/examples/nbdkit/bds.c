/* An nbdkit plugin: serves any image that libbds opens.
 *
 *     cc -shared -fPIC bds.c -o nbdkit-bds-plugin.so $(pkg-config --cflags --libs bds)
 *     nbdkit ./nbdkit-bds-plugin.so file=overlay.qcow2 format=qcow2
 *
 * Parameters: file (required), format (guessed without it, then read-only), and trust=1 to open
 * files that the image names, such as its backing file. */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bds.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static char *file;
static const char *format;
static int trusts;
static bds_context context;

struct connection {
    bds_node node;
    bds_backend disk;
};

/* nbdkit shows the message and sends the errno. */
static int failed(int status, const char *what) {
    nbdkit_error("%s: %s", what, bds_error_message());
    nbdkit_set_error(bds_status_to_errno(status));
    return -1;
}

static int plugin_config(const char *key, const char *value) {
    if (strcmp(key, "file") == 0) {
        file = nbdkit_realpath(value);
        return file ? 0 : -1;
    }
    if (strcmp(key, "format") == 0) {
        format = value;
        return 0;
    }
    if (strcmp(key, "trust") == 0) {
        trusts = nbdkit_parse_bool(value);
        return trusts < 0 ? -1 : 0;
    }
    nbdkit_error("unknown parameter '%s'", key);
    return -1;
}

static int plugin_config_complete(void) {
    if (file)
        return 0;
    nbdkit_error("file=IMAGE is missing");
    return -1;
}

/* After nbdkit has forked: the library works in the process that made its context. */
static int plugin_after_fork(void) {
    bds_context_options options = BDS_CONTEXT_OPTIONS_INIT;
    int result;
    options.flags = trusts ? BDS_CONTEXT_TRUST_REFERENCES : 0;
    result = bds_context_create(&options, &context);
    return result < 0 ? failed(result, "context") : 0;
}

static void plugin_cleanup(void) {
    (void)bds_context_unref_p(&context);
}

static void plugin_unload(void) {
    free(file);
}

static void *plugin_open(int readonly) {
    struct connection *c = calloc(1, sizeof *c);
    bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
    uint32_t flags = readonly || !format ? BDS_OPEN_READ_ONLY : 0;
    int result;
    if (!c) {
        nbdkit_error("out of memory");
        return NULL;
    }
    if (!format)
        flags |= BDS_OPEN_PROBE;
    result = bds_node_open_path(context, file, format, flags, &c->node);
    if (result >= 0) {
        options.flags = flags & BDS_OPEN_READ_ONLY ? 0 : BDS_BACKEND_WRITABLE;
        result = bds_backend_create_on(c->node, &options, &c->disk);
    }
    if (result < 0) {
        (void)failed(result, file);
        (void)bds_node_unref_p(&c->node);
        free(c);
        return NULL;
    }
    return c;
}

static void plugin_close(void *handle) {
    struct connection *c = handle;
    (void)bds_backend_unref_p(&c->disk);
    (void)bds_node_unref_p(&c->node);
    free(c);
}

static int64_t plugin_get_size(void *handle) {
    struct connection *c = handle;
    uint64_t bytes;
    int result = bds_backend_length(c->disk, &bytes);
    return result < 0 ? failed(result, "length") : (int64_t)bytes;
}

static int plugin_can_write(void *handle) {
    (void)handle;
    return format != NULL;
}

static int plugin_can_fua(void *handle) {
    (void)handle;
    return NBDKIT_FUA_NATIVE;
}

static int plugin_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags) {
    struct connection *c = handle;
    int result = bds_pread(c->disk, buf, count, offset, 0);
    (void)flags;
    return result < 0 ? failed(result, "read") : 0;
}

static int plugin_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset,
                         uint32_t flags) {
    struct connection *c = handle;
    uint32_t fua = flags & NBDKIT_FLAG_FUA ? BDS_REQ_FUA : 0;
    int result = bds_pwrite(c->disk, buf, count, offset, fua);
    return result < 0 ? failed(result, "write") : 0;
}

static int plugin_flush(void *handle, uint32_t flags) {
    struct connection *c = handle;
    int result = bds_flush(c->disk);
    (void)flags;
    return result < 0 ? failed(result, "flush") : 0;
}

static int plugin_trim(void *handle, uint32_t count, uint64_t offset, uint32_t flags) {
    struct connection *c = handle;
    int result = bds_discard(c->disk, offset, count, 0);
    if (result >= 0 && flags & NBDKIT_FLAG_FUA)
        result = bds_flush(c->disk);
    return result < 0 ? failed(result, "trim") : 0;
}

static int plugin_zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags) {
    struct connection *c = handle;
    uint32_t wanted = flags & NBDKIT_FLAG_MAY_TRIM ? BDS_REQ_MAY_UNMAP : 0;
    int result;
    if (flags & NBDKIT_FLAG_FUA)
        wanted |= BDS_REQ_FUA;
    result = bds_write_zeroes(c->disk, offset, count, wanted);
    return result < 0 ? failed(result, "zero") : 0;
}

static struct nbdkit_plugin plugin = {
    .name = "bds",
    .longname = "bds block layer",
    .description = "Serves images through libbds",
    .config = plugin_config,
    .config_complete = plugin_config_complete,
    .after_fork = plugin_after_fork,
    .cleanup = plugin_cleanup,
    .unload = plugin_unload,
    .open = plugin_open,
    .close = plugin_close,
    .get_size = plugin_get_size,
    .can_write = plugin_can_write,
    .can_fua = plugin_can_fua,
    .pread = plugin_pread,
    .pwrite = plugin_pwrite,
    .flush = plugin_flush,
    .trim = plugin_trim,
    .zero = plugin_zero,
};

NBDKIT_REGISTER_PLUGIN(plugin)
