/* The monitor's list: nodes and backends stay because of their names, without a handle. */
#include "check.h"

int main(void) {
    bds_context context = new_context();
    bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
    bds_backend drive, found;
    bds_node node;
    bds_guard guard;
    bds_change change;
    uint64_t id, other;
    char *json;

    IS(BDS_ERR_OPTION, bds_monitor_add(context, "driver=mem,size=1M", &id));
    OK(bds_monitor_add(context, "driver=mem,node-name=disk,size=1M", &id));
    IS(BDS_ERR_EXISTS, bds_monitor_add(context, "driver=mem,node-name=disk,size=1M", NULL));
    OK(bds_query(context, "monitor", &json));
    CHECK(has(json, "[\"disk\"]"));
    OK(bds_node_find(context, "disk", &node));
    OK(bds_node_id(node, &other));
    CHECK(id == other);

    /* A handle is a holder, and a blocker is a reason. */
    IS(BDS_ERR_IN_USE, bds_monitor_del(context, "disk", NULL));
    OK(bds_node_block(node, BDS_BLOCK_DELETE, "not now", &guard));
    IS(BDS_STILL_REFERENCED, bds_node_unref(node));
    IS(BDS_ERR_IN_USE, bds_monitor_del(context, "disk", NULL));
    CHECK(strstr(bds_error_message(), "not now") != NULL);
    OK(bds_guard_unref(guard));
    OK(bds_monitor_del(context, "disk", &json));
    CHECK(has(json, "\"disk\""));
    IS(BDS_ERR_NOT_FOUND, bds_monitor_del(context, "disk", NULL));

    /* A node that the list does not hold is not its to close. */
    node = new_disk(context, "driver=mem,node-name=mine,size=1M");
    IS(BDS_ERR_OPTION, bds_monitor_del(context, "mine", NULL));

    /* A backend on the list. */
    OK(bds_backend_create(context, NULL, &drive));
    IS(BDS_ERR_OPTION, bds_monitor_add_backend(drive));
    OK(bds_backend_unref(drive));
    options.name = "cd0";
    options.flags = BDS_BACKEND_CLAIM_NAME;
    OK(bds_backend_create(context, &options, &drive));
    OK(bds_monitor_add_backend(drive));
    IS(BDS_ERR_EXISTS, bds_monitor_add_backend(drive));
    OK(bds_backend_insert(drive, node));
    (void)bds_backend_unref(drive);
    OK(bds_backend_find(context, "cd0", &found));
    OK(bds_backend_attach_device(found, "ide0"));
    IS(BDS_ERR_IN_USE, bds_monitor_del_backend(context, "cd0"));
    CHECK(strstr(bds_error_message(), "ide0") != NULL);
    OK(bds_backend_detach_device(found));

    /* Permissions as part of a change. */
    OK(bds_change_create(context, &change));
    IS(BDS_ERR_VERSION, bds_change_set_permissions(change, found, 1u << 20, BDS_PERM_ALL));
    OK(bds_change_set_permissions(change, found, BDS_PERM_CONSISTENT_READ, BDS_PERM_ALL));
    OK(bds_change_rename(change, node, "renamed"));
    OK(bds_change_commit(change, NULL));
    OK(bds_backend_query(found, &json));
    CHECK(has(json, "\"consistent-read\""));
    OK(bds_change_unref(change));

    IS(BDS_STILL_REFERENCED, bds_monitor_del_backend(context, "cd0"));
    IS(BDS_ERR_OPTION, bds_monitor_del_backend(context, "cd0"));
    OK(bds_backend_unref(found));
    IS(BDS_ERR_NOT_FOUND, bds_monitor_del_backend(context, "cd0"));
    OK(bds_node_unref(node));
    OK(bds_context_unref(context));
    return 0;
}
