/* Graphs of the simulated device: a list of operations, and of waits for numbers in memory, as they were captured.
 *
 * The operations are the emulator's, known here by number: it notes each one on the stream that it would run on, and
 * is called back with the numbers when a graph is executed. Groups of tasks can be updated, as attention's are, whose
 * lists of lengths are the host's. One capture and one update at a time, as torch_npu has it.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simulated.h"

#define REFUSED 107000 /* ACL_ERROR_RT_PARAM_INVALID */

typedef struct {
    enum { OPERATION, WAIT, WRITE } kind;
    long number;
    uint64_t *address, value;
} Node;

typedef struct {
    Node *nodes;
    size_t count;
} Model;

typedef struct {
    Model *model;
    size_t first, end;
} Group; /* of a model's nodes; lives as long as the process, as few are made */

static Model *model;         /* being captured */
static aclrtStream captured; /* the stream that is */
static int spoiled;
static long opened = -1; /* the first node of the open group */
static Group *updated;
static aclrtStream updating;
static size_t update_at;
static int (*execute)(long number);
static char words[512] = "simulated device";

const char *last_words(void) { return words; }

int is_capturing(aclrtStream stream) { return model && (!stream || stream == captured); }

aclError refuse(const char *why) {
    snprintf(words, sizeof words, "simulated device: %s", why);
    spoiled = 1;
    return REFUSED;
}

static aclError append(Node node) {
    Node *grown = realloc(model->nodes, (model->count + 1) * sizeof *grown);
    if (!grown) return refuse("the host has no memory for the graph");
    model->nodes = grown;
    grown[model->count++] = node;
    return ACL_SUCCESS;
}

/* for the emulator */

#define OURS __attribute__((visibility("default")))

OURS void sim_set_execute(int (*call)(long)) { execute = call; }
OURS void sim_say(const char *text) { refuse(text); }
OURS void sim_abandon(void) { updated = NULL; }
OURS int sim_active(void) { return model || updated; }
OURS int sim_capturing(aclrtStream stream) { return is_capturing(stream); }
OURS int sim_updating(aclrtStream stream) { return updated && stream == updating; }

/* An operation on a stream that is captured or updated; the number of the one that it replaces, 0 for none, -1 for an
 * error. Numbers start at 1. */
OURS long sim_note(aclrtStream stream, long number) {
    if (is_capturing(stream)) return append((Node){OPERATION, number, NULL, 0}) ? -1 : 0;
    if (!sim_updating(stream) || update_at == updated->end) {
        refuse("an update has more operations than the group of tasks that was captured");
        return -1;
    }
    Node *node = &updated->model->nodes[update_at++];
    long old = node->number;
    node->number = number;
    return old;
}

/* the runtime's functions */

aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr kind, aclrtStreamAttrValue *value) {
    (void)kind; /* torch_npu asks for the operations' shapes to be kept with the graph, for profilers */
    return stream && value ? ACL_SUCCESS : REFUSED;
}

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
    (void)mode;
    if (model || !stream) return refuse("a capture begins while another one is under way, or on no stream");
    model = calloc(1, sizeof *model);
    captured = stream;
    spoiled = 0;
    opened = -1;
    return model ? ACL_SUCCESS : REFUSED;
}
aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *made) {
    *status = !is_capturing(stream) ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
              : spoiled             ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED
                                    : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
    *made = is_capturing(stream) ? model : NULL;
    return ACL_SUCCESS;
}
aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *made) {
    if (!is_capturing(stream)) return refuse("a capture ends on a stream that is not captured");
    *made = model;
    model = NULL;
    captured = NULL;
    if (opened >= 0) return refuse("a capture ends within a group of tasks");
    return spoiled ? REFUSED : ACL_SUCCESS;
}
aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) { return mode ? ACL_SUCCESS : REFUSED; }
aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
    if (!is_capturing(stream) || opened >= 0) return refuse("a group of tasks begins outside a capture, or within another");
    opened = (long)model->count;
    return ACL_SUCCESS;
}
aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp *handle) {
    if (!is_capturing(stream) || opened < 0) return refuse("a group of tasks ends that has not begun");
    Group *group = malloc(sizeof *group);
    *group = (Group){model, (size_t)opened, model->count};
    opened = -1;
    *handle = group;
    return ACL_SUCCESS;
}
aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle) {
    if (updated || is_capturing(stream)) return refuse("an update begins within another, or within a capture");
    updated = handle;
    updating = stream;
    update_at = updated->first;
    return ACL_SUCCESS;
}
aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
    if (!sim_updating(stream)) return refuse("an update ends that has not begun");
    int whole = update_at == updated->end;
    updated = NULL;
    return whole ? ACL_SUCCESS : refuse("an update has fewer operations than the group of tasks that was captured");
}
/* How torch_npu makes a graph wait for the update of its lists: ExternalEvent. */
aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
    (void)flag;
    if (is_capturing(stream)) return append((Node){WAIT, 0, address, value});
    return *(uint64_t *)address >= value ? ACL_SUCCESS : refuse("a stream waits for ever for a number in memory");
}
aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
    (void)flag;
    if (is_capturing(stream)) return append((Node){WRITE, 0, address, value});
    *(uint64_t *)address = value;
    return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI made, aclrtStream stream) {
    if (is_capturing(stream)) return refuse("a graph is executed within a capture");
    const Model *it = made;
    for (size_t at = 0; at < it->count; at++) {
        const Node *node = &it->nodes[at];
        if (node->kind == WRITE) *node->address = node->value;
        if (node->kind == WAIT && *node->address < node->value)
            return refuse("the graph waits for ever: its lists were not updated since it ran last");
        if (node->kind == OPERATION && execute(node->number)) return REFUSED;
    }
    return ACL_SUCCESS;
}
aclError aclmdlRIDestroy(aclmdlRI made) {
    free(((Model *)made)->nodes);
    free(made);
    return ACL_SUCCESS;
}
