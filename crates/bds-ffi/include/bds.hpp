// bds.hpp: C++17 over bds.h: handles that release themselves, errors as exceptions.
//
// Header-only; link with libbds. One class a kind of handle: it owns one handle, moves, does not
// copy (`ref()` makes another reference where the kind has one), and releases in its destructor.
// `get()` gives the C handle for every function that has no method here; `release()` gives it up.
// A moved-from object holds no handle (0), with which every function says BDS_ERR_STALE.
//
// Errors are exceptions of type bds::Error, because constructors cannot return them and an error
// that is forgotten must not pass. No exception crosses C code: the library calls nothing here.
// Destructors drop what an unref says. Requests of queues report by completions, not by exceptions.
#ifndef BDS_HPP
#define BDS_HPP

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "bds.h"

namespace bds {

/// A call failed.
class Error : public std::runtime_error {
public:
    Error(int status, const std::string &message) : std::runtime_error(message), status_(status) {}
    /// The code: a negative errno, or a bds_status.
    int status() const noexcept { return status_; }
    /// The positive errno that says most about it.
    int error_number() const noexcept { return bds_status_to_errno(status_); }
    /// The handle was released before, or is none.
    bool is_stale() const noexcept { return status_ == BDS_ERR_STALE; }

private:
    int status_;
};

/// Returns the status of a call, or throws what it and the thread's message say.
inline int check(int status) {
    if (status < 0)
        throw Error(status, bds_error_message());
    return status;
}

/// Takes a string over from the library.
inline std::string take(char *text) {
    std::string copy = text ? text : "";
    bds_free(text);
    return copy;
}

/// Calls a function whose last parameter returns a string.
template <typename Function, typename... Args>
std::string text(Function function, Args... args) {
    char *out = nullptr;
    check(function(args..., &out));
    return take(out);
}

/// One handle, released once.
template <typename Raw, int (*Unref)(Raw)>
class Handle {
public:
    Handle() noexcept : raw_{0} {}
    /// Takes a handle over.
    explicit Handle(Raw raw) noexcept : raw_(raw) {}
    Handle(Handle &&other) noexcept : raw_(other.release()) {}
    Handle &operator=(Handle &&other) noexcept {
        if (this != &other) {
            reset();
            raw_ = other.release();
        }
        return *this;
    }
    Handle(const Handle &) = delete;
    Handle &operator=(const Handle &) = delete;
    ~Handle() { reset(); }

    /// The C handle; still owned here.
    Raw get() const noexcept { return raw_; }
    explicit operator bool() const noexcept { return raw_.raw != 0; }
    /// Gives the handle up: the caller releases it.
    Raw release() noexcept {
        Raw raw = raw_;
        raw_.raw = 0;
        return raw;
    }
    /// Releases the handle now: BDS_OK or BDS_STILL_REFERENCED, as the unref function says.
    int reset() noexcept {
        Raw raw = release();
        return raw.raw ? Unref(raw) : static_cast<int>(BDS_OK);
    }

private:
    Raw raw_;
};

class Context;

/// An open image, protocol or filter.
class Node : public Handle<bds_node, bds_node_unref> {
public:
    using Handle::Handle;
    Node ref() const {
        bds_node out;
        check(bds_node_ref(get(), &out));
        return Node(out);
    }
    std::uint64_t id() const {
        std::uint64_t out = 0;
        check(bds_node_id(get(), &out));
        return out;
    }
    std::string name() const { return text(bds_node_name, get()); }
    std::string query() const { return text(bds_node_query, get()); }
    /// Flushes and closes, and throws what fails; the handle is released all the same if it did.
    void close() { check(bds_node_close(get(), nullptr)); }
};

/// A device's or program's access to a node.
class Backend : public Handle<bds_backend, bds_backend_unref> {
public:
    using Handle::Handle;
    explicit Backend(const Node &node, std::uint32_t flags = 0, const char *name = nullptr) {
        bds_backend_options options = BDS_BACKEND_OPTIONS_INIT;
        options.flags = flags;
        options.name = name;
        bds_backend out;
        check(bds_backend_create_on(node.get(), &options, &out));
        *this = Backend(out);
    }
    static Backend writer(const Node &node, const char *name = nullptr) {
        return Backend(node, BDS_BACKEND_WRITABLE, name);
    }
    std::uint64_t length() const {
        std::uint64_t out = 0;
        check(bds_backend_length(get(), &out));
        return out;
    }
    void read(void *buffer, std::size_t bytes, std::uint64_t offset) const {
        check(bds_pread(get(), buffer, bytes, offset, 0));
    }
    void write(const void *buffer, std::size_t bytes, std::uint64_t offset,
               std::uint32_t flags = 0) const {
        check(bds_pwrite(get(), buffer, bytes, offset, flags));
    }
    void write_zeroes(std::uint64_t offset, std::uint64_t bytes, std::uint32_t flags = 0) const {
        check(bds_write_zeroes(get(), offset, bytes, flags));
    }
    void discard(std::uint64_t offset, std::uint64_t bytes) const {
        check(bds_discard(get(), offset, bytes, 0));
    }
    void flush() const { check(bds_flush(get())); }
    void insert(const Node &node) const { check(bds_backend_insert(get(), node.get())); }
    bool eject() const { return check(bds_backend_eject(get())) == 1; }
    std::string query() const { return text(bds_backend_query, get()); }
};

/// A drained section: no request is in flight until it ends.
using Section = Handle<bds_section, bds_graph_drain_end>;
/// A frozen chain, blocked operations or copy-on-read, until it ends.
using Guard = Handle<bds_guard, bds_guard_unref>;
/// A registered region of memory.
using Memory = Handle<bds_memory, bds_memory_unref>;
/// A thread that serves queues.
using Iothread = Handle<bds_iothread, bds_iothread_unref>;

/// A block job. It goes on when the object ends.
class Job : public Handle<bds_job, bds_job_unref> {
public:
    using Handle::Handle;
    /// Waits for the job's end and throws why it failed.
    void wait() const { check(bds_job_wait(get(), nullptr, -1)); }
    /// Waits for a state; false: the time is over.
    bool wait(const char *state, std::int64_t timeout_ns = -1) const {
        int status = bds_job_wait(get(), state, timeout_ns);
        return status == -ETIME ? false : (check(status), true);
    }
    void pause() const { check(bds_job_pause(get())); }
    void resume() const { check(bds_job_resume(get())); }
    void complete() const { check(bds_job_complete(get())); }
    void finalize() const { check(bds_job_finalize(get())); }
    void cancel(bool force = true) const { check(bds_job_cancel(get(), force)); }
    std::string query() const { return text(bds_job_query, get()); }
    bds_job_info info() const {
        bds_job_info out = BDS_JOB_INFO_INIT;
        check(bds_job_get_info(get(), &out));
        return out;
    }
};

/// Edits of the graph that take effect together or not at all.
class Change : public Handle<bds_change, bds_change_unref> {
public:
    using Handle::Handle;
    explicit Change(const Context &context);
    Change &append(const Node &top, const Node &overlay) {
        check(bds_change_append(get(), top.get(), overlay.get()));
        return *this;
    }
    Change &replace(const Node &from, const Node &to) {
        check(bds_change_replace(get(), from.get(), to.get()));
        return *this;
    }
    Change &insert(const Backend &backend, const Node &node) {
        check(bds_change_insert(get(), backend.get(), node.get()));
        return *this;
    }
    Change &eject(const Backend &backend) {
        check(bds_change_eject(get(), backend.get()));
        return *this;
    }
    Change &rename(const Node &node, const char *name) {
        check(bds_change_rename(get(), node.get(), name));
        return *this;
    }
    Change &add_bitmap(const Node &node, const char *name, std::uint32_t flags = 0) {
        check(bds_change_bitmap_add(get(), node.get(), name, 0, flags));
        return *this;
    }
    /// Makes all edits; returns the report.
    std::string commit() { return text(bds_change_commit, get()); }
};

/// A queue of requests, for one consumer at a time.
class Queue : public Handle<bds_queue, bds_queue_unref> {
public:
    using Handle::Handle;
    explicit Queue(const Context &context, std::uint32_t depth = 128, std::uint32_t flags = 0);
    int fd() const { return check(bds_queue_fd(get())); }
    /// How many were accepted; 0: the queue is full.
    std::size_t submit(bds_request *requests, std::size_t count) const {
        int taken = bds_queue_submit(get(), requests, count);
        return static_cast<std::size_t>(taken == -EAGAIN ? 0 : check(taken));
    }
    std::size_t poll(bds_completion *out, std::size_t capacity) const {
        return static_cast<std::size_t>(check(bds_queue_poll(get(), out, capacity)));
    }
    std::size_t wait(bds_completion *out, std::size_t capacity, std::size_t min = 1) const {
        return static_cast<std::size_t>(check(bds_queue_wait(get(), out, capacity, min, -1)));
    }
    void cancel(std::uint64_t request_id) const { check(bds_queue_cancel(get(), request_id)); }
};

/// An event and its JSON.
struct Event {
    bds_event facts;
    std::string json;
};

/// A graph of nodes with its jobs and events.
class Context : public Handle<bds_context, bds_context_unref> {
public:
    explicit Context(std::uint32_t flags = 0, bds_log_fn log = nullptr, std::uint64_t user_data = 0) {
        bds_context_options options = BDS_CONTEXT_OPTIONS_INIT;
        options.flags = flags;
        options.log = log;
        options.log_user_data = user_data;
        bds_context out;
        check(bds_context_create(&options, &out));
        static_cast<Handle &>(*this) = Handle(out);
    }
    /// Opens a node: JSON or `key=value,…`.
    Node open(const char *options) const {
        bds_node out;
        check(bds_node_open(get(), options, &out));
        return Node(out);
    }
    Node open(const std::string &options) const { return open(options.c_str()); }
    Node open_path(const char *path, const char *driver, std::uint32_t flags = 0) const {
        bds_node out;
        check(bds_node_open_path(get(), path, driver, flags, &out));
        return Node(out);
    }
    Node find(const char *name) const {
        bds_node out;
        check(bds_node_find(get(), name, &out));
        return Node(out);
    }
    /// A reference to the node of this id, if it lives; no other node ever has the id.
    std::optional<Node> acquire(std::uint64_t id) const {
        bds_node out;
        int status = bds_node_acquire(get(), id, &out);
        if (status == BDS_ERR_STALE)
            return std::nullopt;
        check(status);
        return Node(out);
    }
    void create_image(const char *path, const char *driver, const char *options) const {
        check(bds_image_create(get(), path, driver, options));
    }
    Job start_job(const char *type, const char *options) const {
        bds_job out;
        check(bds_job_start(get(), type, options, &out));
        return Job(out);
    }
    Section drain_all() const {
        bds_section out;
        check(bds_graph_drain_all(get(), &out));
        return Section(out);
    }
    std::string query(const char *what) const { return text(bds_query, get(), what); }
    std::optional<Event> next_event() const {
        Event event{};
        char *json = nullptr;
        if (check(bds_context_next_event(get(), &event.facts, &json)) == 0)
            return std::nullopt;
        event.json = take(json);
        return event;
    }
    /// Closes everything, and throws what fails.
    void shutdown() const { check(bds_context_shutdown(get(), nullptr)); }
};

inline Change::Change(const Context &context) {
    bds_change out;
    check(bds_change_create(context.get(), &out));
    *this = Change(out);
}

inline Queue::Queue(const Context &context, std::uint32_t depth, std::uint32_t flags) {
    bds_queue_options options = BDS_QUEUE_OPTIONS_INIT;
    options.depth = depth;
    options.flags = flags;
    bds_queue out;
    check(bds_queue_create(context.get(), &options, &out));
    *this = Queue(out);
}

/// Holds the links from `top` down to `base` where they are.
inline Guard freeze_chain(const Node &top, const Node &base, const char *holder) {
    bds_guard out;
    check(bds_graph_freeze_chain(top.get(), base.get(), holder, &out));
    return Guard(out);
}

/// Blocks operations (`BDS_BLOCK_`) on a node.
inline Guard block(const Node &node, std::uint32_t operations, const char *reason) {
    bds_guard out;
    check(bds_node_block(node.get(), operations, reason, &out));
    return Guard(out);
}

/// Keeps requests out of a node, and waits for those that are in it.
inline Section drain(const Node &node, std::uint32_t flags = 0) {
    bds_section out;
    check(bds_graph_drain_begin(node.get(), flags, -1, &out));
    return Section(out);
}

} // namespace bds
#endif // BDS_HPP
