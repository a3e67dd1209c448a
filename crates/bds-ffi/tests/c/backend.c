/* Backends: media, permissions, error policies, names. */
#include "check.h"

int main(void) {
    char byte = 1, *json;
    bds_context context = new_context();
    bds_node a = new_disk(context, "driver=mem,node-name=a,size=1M"), found;
    bds_node b = new_disk(context, "driver=mem,node-name=b,size=2M,read-only=on");
    bds_backend drive, other, again;
    bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
    bds_section section;
    uint64_t length;

    options.name = "cd0";
    options.flags = BDS_BACKEND_CLAIM_NAME;
    OK(bds_backend_create(context, &options, &drive));
    IS(BDS_ERR_EXISTS, bds_backend_create(context, &options, &other));
    IS(-ENOMEDIUM, bds_pread(drive, &byte, 1, 0, 0));
    IS(BDS_ERR_NOT_FOUND, bds_backend_node(drive, &found));
    OK(bds_backend_insert(drive, a));
    IS(BDS_ERR_IN_USE, bds_backend_insert(drive, b));
    OK(bds_backend_replace_medium(drive, b));
    OK(bds_backend_length(drive, &length));
    CHECK(length == 2 << 20);
    IS(1, bds_backend_eject(drive));
    IS(0, bds_backend_eject(drive));
    OK(bds_backend_find(context, "cd0", &again));
    CHECK(again.raw != drive.raw);
    IS(BDS_ERR_NOT_FOUND, bds_backend_find(context, "cd1", &other));
    OK(bds_backend_ref(drive, &other));
    IS(BDS_STILL_REFERENCED, bds_backend_unref(other));
    IS(BDS_ERR_STALE, bds_backend_unref(other));

    /* Permissions. */
    options.name = NULL;
    options.flags = BDS_BACKEND_WRITABLE;
    IS(BDS_ERR_READ_ONLY, bds_backend_create_on(b, &options, &other));
    OK(bds_backend_create_on(a, &options, &other));
    OK(bds_pwrite(other, &byte, 1, 0, 0));
    options.flags = 0;
    options.permissions = BDS_PERM_CONSISTENT_READ;
    options.shared_permissions = BDS_PERM_CONSISTENT_READ;
    {
        bds_backend jealous;
        IS(BDS_ERR_IN_USE, bds_backend_create_on(a, &options, &jealous));
        OK(bds_backend_set_permissions(other, BDS_PERM_CONSISTENT_READ, BDS_PERM_ALL));
        OK(bds_backend_create_on(a, &options, &jealous));
        IS(BDS_ERR_IN_USE, bds_backend_set_permissions(other, BDS_PERM_WRITE, BDS_PERM_ALL));
        OK(bds_backend_unref(jealous));
    }
    IS(BDS_ERR_VERSION, bds_backend_set_permissions(other, 1u << 20, 0));
    options.permissions = ~(uint64_t)0;
    IS(BDS_ERR_VERSION, bds_backend_create_on(a, &options, &again));

    /* Policies and modes. */
    OK(bds_backend_set_on_error(other, BDS_ON_ERROR_STOP, BDS_ON_ERROR_ENOSPC));
    OK(bds_backend_query(other, &json));
    CHECK(strstr(json, "\"on-read-error\":\"stop\"") != NULL);
    CHECK(has(json, "\"on-write-error\":\"enospc\""));
    IS(BDS_ERR_ARGUMENT, bds_backend_set_on_error(other, 0, 0));
    IS(BDS_ERR_VERSION, bds_backend_set_on_error(other, 77, 1));
    OK(bds_backend_resume(other));
    OK(bds_backend_set_writethrough(other, 1));
    IS(BDS_ERR_ARGUMENT, bds_backend_set_writethrough(other, 2));

    /* A drained backend. */
    OK(bds_backend_drain(other, &section));
    OK(bds_graph_drain_end(section));
    OK(bds_backend_revoke(other));
    IS(-ENOMEDIUM, bds_pread(other, &byte, 1, 0, 0));

    OK(bds_backend_unref(other));
    OK(bds_backend_find(context, "cd0", &again));
    (void)bds_backend_unref(again);
    (void)bds_backend_unref(drive);
    OK(bds_node_unref(a));
    OK(bds_node_unref(b));
    IS(BDS_STILL_REFERENCED, bds_context_unref(context)); /* a handle of cd0 is left */
    return 0;
}
