/* Checks Kimi Delta Attention, evaluated in double, against the published test vectors, with nothing but the C library:
 * what a port in another language has to do, in one file.
 *
 *     gcc -std=c99 -O2 check_vectors.c -lm -o check_vectors && ./check_vectors ../vectors
 *
 * Forward results of every case of the operator are computed token by token. The reference's error is at most the published bound; the
 * same bound covers this program's, whose sums are only ordered otherwise, so the two may differ by twice the bound. Exit status: 0 if
 * all agree, 1 if not, 2 if a file cannot be read.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- JSON: a tree of nodes; members and elements are linked lists. */
typedef struct Node {
    char kind; /* '{' '[' '"' '0' for a number, 't' 'f' 'n' */
    char *key, *text;
    double number;
    struct Node *child, *next;
} Node;

static void die(const char *what, const char *name) {
    fprintf(stderr, "%s: %s\n", what, name);
    exit(2);
}

static void *allocate(size_t size) {
    void *memory = calloc(size ? size : 1, 1);
    if (!memory) die("out of memory", "");
    return memory;
}

static const char *skip(const char *s) {
    while (*s == ' ' || *s == '\n' || *s == '\r' || *s == '\t' || *s == ',' || *s == ':') s++;
    return s;
}

static const char *parse_string(const char *s, char **out) {
    const char *end = ++s;
    while (*end && *end != '"') end += *end == '\\' ? 2 : 1;
    if (!*end) die("malformed", "JSON string");
    *out = allocate((size_t)(end - s) + 1);
    memcpy(*out, s, (size_t)(end - s));
    return end + 1;
}

static const char *parse(const char *s, Node **out) {
    Node *node = *out = allocate(sizeof *node);
    s = skip(s);
    node->kind = *s;
    if (*s == '{' || *s == '[') {
        Node **tail = &node->child;
        char close = *s == '{' ? '}' : ']';
        for (s = skip(s + 1); *s != close; s = skip(s)) {
            char *key = NULL;
            if (!*s) die("malformed", "JSON");
            if (close == '}') s = parse_string(s, &key);
            s = parse(s, tail);
            (*tail)->key = key;
            tail = &(*tail)->next;
        }
        return s + 1;
    }
    if (*s == '"') return parse_string(s, &node->text);
    if (*s == 't' || *s == 'n') return s + 4;
    if (*s == 'f') return s + 5;
    char *end;
    node->kind = '0';
    node->number = strtod(s, &end);
    if (end == s) die("malformed", "JSON value");
    return end;
}

static const Node *find(const Node *object, const char *key) {
    for (const Node *n = object->child; n; n = n->next)
        if (!strcmp(n->key, key)) return n;
    return NULL;
}

static const Node *member(const Node *object, const char *key) {
    const Node *found = find(object, key);
    if (!found) die("missing member", key);
    return found;
}

static int is_true(const Node *object, const char *key) { return member(object, key)->kind == 't'; }

/* ---- Files. */
static char *read_file(const char *folder, const char *name, size_t *size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) die("cannot read", path);
    *size = (size_t)ftell(file);
    rewind(file);
    char *contents = allocate(*size + 1);
    if (fread(contents, 1, *size, file) != *size) die("cannot read", path);
    fclose(file);
    return contents;
}

/* A safetensors file: eight bytes, the length of the header (little endian); the header, JSON; the data. */
typedef struct {
    Node *header;
    const unsigned char *data;
} Tensors;

typedef struct {
    double *at; /* NULL where there is no such tensor */
    long shape[4], count;
} Tensor;

static uint64_t little_endian(const unsigned char *bytes, int number) {
    uint64_t value = 0;
    while (number--) value = value << 8 | bytes[number];
    return value;
}

static double as_double(const unsigned char *bytes, const char *dtype) {
    if (!strcmp(dtype, "F64")) {
        uint64_t bits = little_endian(bytes, 8);
        double value;
        memcpy(&value, &bits, 8);
        return value;
    }
    uint32_t bits = !strcmp(dtype, "F32") ? (uint32_t)little_endian(bytes, 4) : (uint32_t)little_endian(bytes, 2) << 16;
    float value; /* bfloat16 is the upper half of a float */
    memcpy(&value, &bits, 4);
    return value;
}

static Tensor tensor(const Tensors *file, const char *id, const char *name) {
    char key[256];
    Tensor found = {NULL, {1, 1, 1, 1}, 1};
    snprintf(key, sizeof key, "%s.%s", id, name);
    const Node *entry = find(file->header, key);
    if (!entry) return found;
    const char *dtype = member(entry, "dtype")->text;
    int width = !strcmp(dtype, "F64") ? 8 : !strcmp(dtype, "F32") ? 4 : !strcmp(dtype, "BF16") ? 2 : 0, axis = 0;
    if (!width) die("unexpected dtype of", key);
    for (const Node *n = member(entry, "shape")->child; n && axis < 4; n = n->next) found.count *= found.shape[axis++] = (long)n->number;
    const unsigned char *bytes = file->data + (size_t)member(entry, "data_offsets")->child->number;
    found.at = allocate((size_t)found.count * sizeof(double));
    for (long i = 0; i < found.count; i++) found.at[i] = as_double(bytes + i * width, dtype);
    return found;
}

static Tensor required(const Tensors *file, const char *id, const char *name) {
    Tensor found = tensor(file, id, name);
    if (!found.at) die(id, name);
    return found;
}

/* ---- What stands in front of the operator. */
static double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }
static double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

static void normalise(double *x, long width) {
    double sum = 1e-6;
    for (long i = 0; i < width; i++) sum += x[i] * x[i];
    for (long i = 0; i < width; i++) x[i] /= sqrt(sum);
}

/* ---- One sequence and value head; state [K, V], with strides for either layout; v and o one row of a token apart. */
typedef struct {
    const double *q, *k, *v, *log_decay, *beta;
    double *o, *state;
    long q_step, v_step, g_step, beta_step, num_tokens, K, V, state_k, state_v;
    double scale;
} Head;

static void recur(Head h) {
    for (long t = 0; t < h.num_tokens; t++, h.q += h.q_step, h.k += h.q_step, h.v += h.v_step, h.o += h.v_step) {
        for (long j = 0; j < h.V; j++) {
            double *column = h.state + j * h.state_v, prediction = 0, read = 0;
            for (long i = 0; i < h.K; i++) prediction += h.k[i] * (column[i * h.state_k] *= exp(h.log_decay[i]));
            double write = *h.beta * (h.v[j] - prediction);
            for (long i = 0; i < h.K; i++) read += h.q[i] * (column[i * h.state_k] += h.k[i] * write);
            h.o[j] = h.scale * read;
        }
        h.log_decay += h.g_step;
        h.beta += h.beta_step;
    }
}

static void evaluate(const Tensors *file, const Node *entry, double *o, double *states) {
    const char *id = member(entry, "id")->text;
    const Node *options = member(entry, "options"), *offsets = member(options, "cu_seqlens");
    Tensor q = required(file, id, "q"), k = required(file, id, "k"), v = required(file, id, "v");
    Tensor g = required(file, id, "g"), beta = required(file, id, "beta");
    Tensor a = tensor(file, id, "A_log"), bias = tensor(file, id, "dt_bias"), initial = tensor(file, id, "initial_state");
    long B = q.shape[0], T = q.shape[1], H = q.shape[2], K = q.shape[3], G = v.shape[2], V = v.shape[3];
    const char *gate = member(options, "gate")->text, *strength = member(options, "beta")->text;
    double bound = member(options, "lower_bound")->number;

    for (long i = 0; is_true(options, "normalise_qk") && i < B * T * H; i++) normalise(q.at + i * K, K), normalise(k.at + i * K, K);
    for (long i = 0; strcmp(gate, "log_decay") && i < g.count; i++) {
        double slope = a.at ? exp(a.at[i / K % G]) : 1, x = g.at[i] + (bias.at ? bias.at[i % (G * K)] : 0);
        g.at[i] = strcmp(gate, "softplus") ? bound * sigmoid(slope * x) : -slope * softplus(x);
    }
    for (long i = 0; strcmp(strength, "strength") && i < beta.count; i++)
        beta.at[i] = (strcmp(strength, "sigmoid") ? 2 : 1) * sigmoid(beta.at[i]);

    const Node *offset = offsets->child;
    long num_sequences = B, first = 0, v_first = is_true(options, "state_v_first");
    if (offsets->kind == '[')
        for (num_sequences = -1; offset; offset = offset->next) num_sequences++;
    offset = offsets->child;
    for (long n = 0; n < num_sequences; n++) {
        long length = T;
        if (offsets->kind == '[') {
            first = (long)offset->number;
            offset = offset->next;
            length = (long)offset->number - first;
        } else
            first = n * T;
        for (long j = 0; j < G; j++) {
            long head = j / (G / H), at = first * G + j;
            double *state = states + (n * G + j) * K * V;
            for (long i = 0; i < K * V; i++) state[i] = initial.at ? initial.at[(n * G + j) * K * V + i] : 0;
            Head one = {q.at + (first * H + head) * K, k.at + (first * H + head) * K, v.at + at * V, g.at + at * K, beta.at + at,
                        o + at * V, state, H * K, G * V, G * K, G, length, K, V, v_first ? 1 : V, v_first ? K : 1,
                        member(options, "scale")->number};
            recur(one);
        }
    }
    double *used[] = {q.at, k.at, v.at, g.at, beta.at, a.at, bias.at, initial.at};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++) free(used[i]);
}

static int agrees(const Tensors *file, const char *id, const char *name, const double *got) {
    char bound_name[64];
    snprintf(bound_name, sizeof bound_name, "%s.bound", name);
    Tensor value = required(file, id, name), bound = required(file, id, bound_name);
    int right = 1;
    for (long i = 0; i < value.count && right; i++) {
        right = fabs(got[i] - value.at[i]) <= 2 * bound.at[i]; /* false for NaN */
        if (!right) printf("%s: %s[%ld] is %.17g, expected %.17g within %.3g\n", id, name, i, got[i], value.at[i], 2 * bound.at[i]);
    }
    free(value.at);
    free(bound.at);
    return right;
}

int main(int count, char **arguments) {
    const char *folder = count > 1 ? arguments[1] : ".";
    size_t size;
    Node *index, *group;
    int passed = 0, failed = 0;
    parse(read_file(folder, "index.json", &size), &index);
    for (const Node *listed = member(index, "groups")->child; listed; listed = listed->next) {
        if (strcmp(member(listed, "kind")->text, "kda")) continue;
        parse(read_file(folder, member(listed, "index")->text, &size), &group);
        unsigned char *raw = (unsigned char *)read_file(folder, member(listed, "data")->text, &size);
        Tensors file = {NULL, raw + 8 + little_endian(raw, 8)};
        parse((char *)raw + 8, &file.header);
        for (const Node *entry = member(group, "cases")->child; entry; entry = entry->next) {
            const char *id = member(entry, "id")->text;
            Tensor o = required(&file, id, "o"), state = required(&file, id, "final_state");
            evaluate(&file, entry, o.at, state.at);
            int right = agrees(&file, id, "o", o.at) & agrees(&file, id, "final_state", state.at);
            right ? passed++ : failed++;
            free(o.at);
            free(state.at);
        }
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}
