/* Counted handles: what goes wrong with plain reference counts, and what happens here instead.
 *
 * Each step is a mistake that was made in block layers: a double unref, a use after unref, an unref
 * in an error path, two owners that do not know of each other, and the question "is it still
 * valid?". None of them can crash or take another owner's reference. */
#include <stdio.h>
#include <stdlib.h>

#include "bds.h"

static void expect(int wanted, int found, const char *step) {
    printf("%-60s %s\n", step, bds_status_name(found));
    if (found != wanted) {
        fprintf(stderr, "expected %s; %s\n", bds_status_name(wanted), bds_error_message());
        exit(1);
    }
}

/* An owner that fails half-way, and releases what it was given: its own reference only. */
static int failing_user(bds_node node) {
    bds_node mine;
    int result = bds_node_ref(node, &mine);
    if (result < 0)
        return result;
    result = bds_node_reopen(mine, "no-such-option=1"); /* goes wrong */
    bds_node_unref(mine);                               /* the error path releases `mine` ... */
    bds_node_unref(mine);                               /* ... twice, by mistake: no harm */
    return result;
}

int main(void) {
    bds_context context;
    bds_node disk, second, again;
    uint64_t id;
    char *facts;

    expect(BDS_OK, bds_context_create(NULL, &context), "a context");
    expect(BDS_OK, bds_node_open(context, "driver=mem,node-name=disk,size=1M", &disk), "a node");

    /* Two owners: each has a handle of its own. */
    expect(BDS_OK, bds_node_ref(disk, &second), "a second owner");
    expect(BDS_STILL_REFERENCED, bds_node_unref(disk), "the first one releases");
    expect(BDS_ERR_STALE, bds_node_unref(disk), "and again, by mistake");
    expect(BDS_OK, bds_node_id(second, &id), "the second one's reference is untouched");

    /* An error path with one release too many. */
    expect(BDS_ERR_OPTION, failing_user(second), "a user that fails, and releases twice");
    expect(BDS_OK, bds_node_query(second, &facts), "the node lives, held by the second owner");
    printf("%s\n", facts);
    bds_free(facts);

    /* Is it still valid? Ask for a reference: the answer stays true. */
    expect(BDS_OK, bds_node_acquire(context, id, &again), "is it still valid? a reference says so");
    expect(BDS_STILL_REFERENCED, bds_node_unref(second), "the second owner releases");
    expect(BDS_OK, bds_node_unref(again), "the last reference: the node ends with this call");
    expect(BDS_ERR_STALE, bds_node_acquire(context, id, &again), "is it still valid? never again");

    /* Use after unref: an error, also when the place in memory holds another node by now. */
    expect(BDS_OK, bds_node_open(context, "driver=mem,node-name=other,size=1M", &again), "another");
    expect(BDS_ERR_STALE, bds_node_query(disk, &facts), "use after unref");
    expect(BDS_ERR_STALE, bds_node_query(second, &facts), "by either owner");
    expect(BDS_OK, bds_node_unref(again), "the other node was not touched");
    expect(BDS_OK, bds_context_unref(context), "the context goes");
    return 0;
}
