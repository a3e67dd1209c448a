/* Layout golden: sizes and offsets of all structs, fixed for the life of the SONAME. */
#include <stddef.h>

#include "check.h"

#ifdef __cplusplus
#define HOLDS(condition) static_assert(condition, #condition)
#else
#define HOLDS(condition) _Static_assert(condition, #condition)
#endif
#define AT(type, field, offset) HOLDS(offsetof(type, field) == (offset))

HOLDS(sizeof(bds_node) == 8);
HOLDS(sizeof(bds_context) == 8);
HOLDS(sizeof(bds_options) == 8);
HOLDS(sizeof(bds_iothread) == 8);
HOLDS(sizeof(bds_backend) == 8);
HOLDS(sizeof(bds_change) == 8);
HOLDS(sizeof(bds_section) == 8);
HOLDS(sizeof(bds_queue) == 8);
HOLDS(sizeof(bds_memory) == 8);
HOLDS(sizeof(bds_job) == 8);

HOLDS(sizeof(bds_request) == 128);
AT(bds_request, opcode, 0);
AT(bds_request, flags, 4);
AT(bds_request, backend, 8);
AT(bds_request, offset, 16);
AT(bds_request, bytes, 24);
AT(bds_request, user_data, 32);
AT(bds_request, buffer, 40);
AT(bds_request, iov, 48);
AT(bds_request, iovcnt, 56);
AT(bds_request, target, 64);
AT(bds_request, target_offset, 72);
AT(bds_request, memory, 80);
AT(bds_request, request_id, 88);
AT(bds_request, reserved, 96);

HOLDS(sizeof(bds_completion) == 64);
AT(bds_completion, user_data, 0);
AT(bds_completion, request_id, 8);
AT(bds_completion, status, 16);
AT(bds_completion, flags, 20);
AT(bds_completion, value, 24);
AT(bds_completion, reserved, 32);

HOLDS(sizeof(bds_event) == 64);
AT(bds_event, sequence, 0);
AT(bds_event, value, 8);
AT(bds_event, type, 16);
AT(bds_event, status, 20);
AT(bds_event, reserved, 24);

HOLDS(sizeof(bds_extent) == 40);
AT(bds_extent, offset, 0);
AT(bds_extent, bytes, 8);
AT(bds_extent, map_offset, 16);
AT(bds_extent, node_id, 24);
AT(bds_extent, flags, 32);
AT(bds_extent, depth, 36);

HOLDS(sizeof(bds_limits) == 72);
AT(bds_limits, request_alignment, 8);
AT(bds_limits, memory_alignment, 12);
AT(bds_limits, max_iov, 16);
AT(bds_limits, discard_alignment, 20);
AT(bds_limits, zero_alignment, 24);
AT(bds_limits, length, 32);
AT(bds_limits, max_transfer, 40);
AT(bds_limits, opt_transfer, 48);
AT(bds_limits, max_discard, 56);
AT(bds_limits, max_zero, 64);

HOLDS(sizeof(bds_context_options) == 32);
AT(bds_context_options, flags, 8);
AT(bds_context_options, log, 16);
AT(bds_context_options, log_user_data, 24);

HOLDS(sizeof(bds_backend_options) == 48);
AT(bds_backend_options, name, 8);
AT(bds_backend_options, permissions, 16);
AT(bds_backend_options, shared_permissions, 24);
AT(bds_backend_options, on_read_error, 32);
AT(bds_backend_options, on_write_error, 36);
AT(bds_backend_options, flags, 40);

HOLDS(sizeof(bds_queue_options) == 24);
AT(bds_queue_options, depth, 8);
AT(bds_queue_options, flags, 12);
AT(bds_queue_options, iothread, 16);

int main(void) {
    return 0;
}
