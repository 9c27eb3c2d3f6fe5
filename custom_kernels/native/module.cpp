// The Python module: checks and passes buffers. It uses only Python's stable interface.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "largest.hpp"
#include "operators.hpp"
#include "pool.hpp"

namespace {

using namespace flashmoe;

struct PythonError {}; // an exception is already set

// The required type of a buffer's elements.
struct Elements {
    const char* name;
    const char* formats; // characters of Python's struct module
    Py_ssize_t bytes;
    const char* other = nullptr; // MLX's format for a type that struct lacks
};

constexpr Elements kFloat{"f32", "f", 4}, kInt{"int32", "il", 4}, kCodes{"uint32", "IL", 4}, kByte{"uint8", "B", 1},
    kDouble{"f64", "d", 8}, kHalf{"f16", "e", 2}, kBrainFloat{"bf16", "H", 2, "bfloat16"};

bool has(const Py_buffer& view, const Elements& wanted) {
    if (view.itemsize != wanted.bytes) return false;
    std::string format = view.format ? view.format : "B"; // the default of the buffer protocol
    if (wanted.other && format == wanted.other) return true;
    if (format.size() == 2 && std::strchr("@=<", format[0])) format.erase(0, 1); // little-endian like this machine
    return format.size() == 1 && std::strchr(wanted.formats, format[0]);
}

// A buffer that is held; if its elements are not contiguous, a contiguous copy.
class Buffer {
public:
    Buffer(PyObject* object, const char* what, const Elements& elements, int64_t count, bool writable = false) {
        // MLX returns strides whether requested or not, so contiguity must be checked here.
        if (PyObject_GetBuffer(object, &view_, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) != 0)
            throw PythonError{};
        try {
            check(what, elements, count, writable);
        } catch (...) {
            PyBuffer_Release(&view_);
            throw;
        }
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { PyBuffer_Release(&view_); }

    const uint8_t* bytes() const { return start_; }
    template <typename T>
    T* as() const {
        if (reinterpret_cast<uintptr_t>(start_) % alignof(T)) throw std::invalid_argument("a buffer is not aligned");
        return reinterpret_cast<T*>(start_);
    }

private:
    void check(const char* what, const Elements& elements, int64_t count, bool writable) {
        start_ = static_cast<uint8_t*>(view_.buf);
        if (!has(view_, elements))
            throw std::invalid_argument(std::string(what) + ": elements of type " + elements.name + " are needed, not " +
                                        (view_.format ? view_.format : "bytes") + " of " +
                                        std::to_string(view_.itemsize) + " bytes");
        if (view_.len / elements.bytes < count)
            throw std::invalid_argument(std::string(what) + ": " + std::to_string(view_.len) + " bytes, but " +
                                        std::to_string(count * elements.bytes) + " are needed");
        if (PyBuffer_IsContiguous(&view_, 'C')) return;
        if (writable) throw std::invalid_argument(std::string(what) + ": must be contiguous");
        copy_.resize(view_.len);
        start_ = copy_.data();
        if (PyBuffer_ToContiguous(start_, &view_, view_.len, 'C') != 0) throw PythonError{};
    }

    Py_buffer view_;
    uint8_t* start_ = nullptr;
    std::vector<uint8_t> copy_;
};

using Held = std::vector<std::unique_ptr<Buffer>>;

float* floats(Held& held, PyObject* object, const char* what, int64_t count, bool writable = false) {
    held.push_back(std::make_unique<Buffer>(object, what, kFloat, count, writable));
    return held.back()->as<float>();
}

class WithoutGil {
public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    WithoutGil(const WithoutGil&) = delete;
    ~WithoutGil() { PyEval_RestoreThread(state_); }

private:
    PyThreadState* state_;
};

template <typename Function>
PyObject* guarded(const Function& function) {
    try {
        function();
    } catch (const PythonError&) {
        return nullptr;
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

void check_format(int64_t rows, int64_t columns, int bits, int group, int type) {
    require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8");
    require(group == 32 || group == 64 || group == 128, "the group size must be 32, 64 or 128");
    require(type >= 0 && type <= 3, "scales must be f32, bf16, f16 or e8m0");
    require(type != 3 || (bits == 4 && group == 32), "scales in e8m0 belong to codes of 4 bits in groups of 32");
    require(rows > 0 && columns > 0 && rows < (int64_t{1} << 31) && columns < (int64_t{1} << 31), "sizes out of range");
    require(columns % group == 0, "columns must be whole groups");
}

// (weight, scales, biases, rows, columns, bits, group, type)
Matrix matrix(Held& held, PyObject* tuple) {
    PyObject *weight, *scales, *biases;
    long long rows, columns;
    int bits, group, type;
    require(PyTuple_Check(tuple), "a matrix must be a tuple");
    if (!PyArg_ParseTuple(tuple, "OOOLLiii", &weight, &scales, &biases, &rows, &columns, &bits, &group, &type))
        throw PythonError{};
    check_format(rows, columns, bits, group, type);
    Matrix m{nullptr, nullptr, nullptr, rows, columns, bits, group, static_cast<Scale>(type)};
    const Elements& factors = type == 0 ? kFloat : type == 1 ? kBrainFloat : type == 2 ? kHalf : kByte;
    const int64_t count = rows * (columns / group);
    held.push_back(std::make_unique<Buffer>(weight, "weight", kCodes, (rows * m.row_bytes() + 3) / 4));
    m.codes = held.back()->bytes();
    held.push_back(std::make_unique<Buffer>(scales, "scales", factors, count));
    m.scales = held.back()->bytes();
    held.push_back(std::make_unique<Buffer>(biases, "biases", factors, count));
    m.biases = held.back()->bytes();
    return m;
}

bool is_activations(int type) { return type >= 0 && type <= 2 && has_activations(static_cast<Activations>(type)); }

Activations checked(int type) {
    require(is_activations(type), "this machine, or this build, has no products with such activations");
    return static_cast<Activations>(type);
}

PyObject* large_pages(PyObject*, PyObject* args) {
    PyObject* y;
    long long count;
    if (!PyArg_ParseTuple(args, "OL", &y, &count)) return nullptr;
    return guarded([&] {
        Held held;
        require(count >= 0, "count out of range");
        float* to = floats(held, y, "y", count, true);
        WithoutGil released;
        use_large_pages(to, count);
    });
}

PyObject* fill(PyObject*, PyObject* args) {
    PyObject *y, *values;
    long long count;
    if (!PyArg_ParseTuple(args, "OOL", &y, &values, &count)) return nullptr;
    return guarded([&] {
        Held held;
        require(count >= 0, "count out of range");
        float* to = floats(held, y, "y", count, true);
        const float* from = values == Py_None ? nullptr : floats(held, values, "values", count);
        WithoutGil released;
        fill_all(from, count, to);
    });
}

PyObject* products(PyObject*, PyObject* args) {
    PyObject *x, *matrices, *results;
    long long tokens;
    int add, activations;
    if (!PyArg_ParseTuple(args, "OLO!O!pi", &x, &tokens, &PyTuple_Type, &matrices, &PyTuple_Type, &results, &add,
                          &activations))
        return nullptr;
    return guarded([&] {
        Held held;
        const Activations type = checked(activations);
        require(tokens >= 0, "tokens out of range");
        const Py_ssize_t count = PyTuple_Size(matrices);
        require(count > 0 && PyTuple_Size(results) == count, "as many results as matrices are needed");
        std::vector<Product> all;
        for (Py_ssize_t i = 0; i < count; ++i) {
            const Matrix own = matrix(held, PyTuple_GetItem(matrices, i));
            require(i == 0 || own.columns == all[0].matrix.columns, "matrices must have as many columns");
            all.push_back({own, floats(held, PyTuple_GetItem(results, i), "y", tokens * own.rows, true)});
        }
        const float* in = floats(held, x, "x", tokens * all[0].matrix.columns);
        WithoutGil released;
        quantized_products(all, in, tokens, add, type);
    });
}

PyObject* norm(PyObject*, PyObject* args) {
    PyObject *x, *weight, *y;
    long long tokens, width;
    float eps;
    if (!PyArg_ParseTuple(args, "OLLOfO", &x, &tokens, &width, &weight, &eps, &y)) return nullptr;
    return guarded([&] {
        Held held;
        require(tokens >= 0 && width > 0, "sizes out of range");
        const float* in = floats(held, x, "x", tokens * width);
        const float* factors = floats(held, weight, "weight", width);
        float* out = floats(held, y, "y", tokens * width, true);
        WithoutGil released;
        rms_norm(in, factors, tokens, width, eps, out);
    });
}

// The layout of an expert's record.
struct Format {
    struct Codes {
        int bits, group, type;
    };

    long long hidden, inner;
    Codes codes[3];       // of gate, up and down
    long long offsets[9]; // of weight, scales and biases of gate, up and down

    explicit Format(PyObject* tuple) {
        long long* o = offsets;
        Codes *gate = codes, *up = codes + 1, *down = codes + 2;
        if (!PyArg_ParseTuple(tuple, "LL((iii)(iii)(iii))(LLLLLLLLL)", &hidden, &inner, &gate->bits, &gate->group,
                              &gate->type, &up->bits, &up->group, &up->type, &down->bits, &down->group, &down->type, o,
                              o + 1, o + 2, o + 3, o + 4, o + 5, o + 6, o + 7, o + 8))
            throw PythonError{};
        check_format(inner, hidden, gate->bits, gate->group, gate->type);
        check_format(inner, hidden, up->bits, up->group, up->type);
        check_format(hidden, inner, down->bits, down->group, down->type);
    }

    Matrix part(int projection, const uint8_t* record) const {
        const bool down = projection == 2;
        const long long* o = offsets + 3 * projection;
        const Codes& own = codes[projection];
        return {record ? record + o[0] : nullptr, record ? record + o[1] : nullptr, record ? record + o[2] : nullptr,
                down ? hidden : inner, down ? inner : hidden, own.bits, own.group, static_cast<Scale>(own.type)};
    }

    int64_t record_bytes() const {
        int64_t most = 0;
        for (int p = 0; p < 3; ++p) {
            const Matrix m = part(p, nullptr);
            const int64_t sizes[3] = {m.rows * m.row_bytes(), m.rows * m.scale_row_bytes(),
                                      m.rows * m.scale_row_bytes()};
            for (int i = 0; i < 3; ++i) {
                require(offsets[3 * p + i] >= 0, "offsets out of range");
                most = std::max<int64_t>(most, offsets[3 * p + i] + sizes[i]);
            }
        }
        return most;
    }
};

// Return the experts with their uses from `records`, `rows` [tokens, choices] and, for the shared expert, `shared` or None.
// `weights` [tokens, choices], with a further column for the shared expert, may be null.
std::vector<ExpertUses> uses_of(Held& held, const Format& format, PyObject* records, PyObject* rows, int64_t tokens,
                                int64_t choices, PyObject* shared, const float* weights) {
    const int64_t hidden = format.hidden, least = format.record_bytes(), columns = choices + (shared != Py_None);
    const auto weight = [&](int64_t t, int64_t k) { return weights ? weights[t * columns + k] : 0.0f; };
    held.push_back(std::make_unique<Buffer>(rows, "rows", kInt, tokens * choices));
    const int32_t* row = held.back()->as<const int32_t>();
    std::vector<ExpertUses> all;
    const Py_ssize_t count = PyList_Size(records);
    for (Py_ssize_t i = 0; i < count; ++i) {
        held.push_back(std::make_unique<Buffer>(PyList_GetItem(records, i), "record", kByte, least));
        const uint8_t* record = held.back()->bytes();
        all.push_back({{format.part(0, record), format.part(1, record), format.part(2, record)}, {}});
    }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t k = 0; k < choices; ++k) {
            const int32_t choice = row[t * choices + k];
            require(choice < count, "a row names no record");
            if (choice >= 0) all[choice].uses.push_back({t, weight(t, k), k});
        }
    all.erase(std::remove_if(all.begin(), all.end(), [](const ExpertUses& one) { return one.uses.empty(); }),
              all.end());
    if (shared == Py_None) return all;
    PyObject *gate, *up, *down;
    require(PyTuple_Check(shared), "a shared expert must be a tuple");
    if (!PyArg_ParseTuple(shared, "O!O!O!", &PyTuple_Type, &gate, &PyTuple_Type, &up, &PyTuple_Type, &down))
        throw PythonError{};
    ExpertUses own{{matrix(held, gate), matrix(held, up), matrix(held, down)}, {}};
    const Expert& e = own.expert;
    require(e.gate.columns == hidden && e.up.columns == hidden && e.down.rows == hidden &&
                e.up.rows == e.gate.rows && e.down.columns == e.gate.rows,
            "the shared expert's matrices do not fit together");
    for (int64_t t = 0; t < tokens; ++t) own.uses.push_back({t, weight(t, choices), choices});
    all.push_back(std::move(own));
    return all;
}

PyObject* experts(PyObject*, PyObject* args) {
    PyObject *x, *records, *form, *rows, *routing_weights, *shared, *y;
    long long tokens, choices;
    int activations;
    if (!PyArg_ParseTuple(args, "OLO!O!OOLOOi", &x, &tokens, &PyList_Type, &records, &PyTuple_Type, &form, &rows,
                          &routing_weights, &choices, &shared, &y, &activations))
        return nullptr;
    return guarded([&] {
        Held held;
        const Activations type = checked(activations);
        require(tokens >= 0 && choices >= 0, "tokens and choices out of range");
        const Format format(form);
        const int64_t hidden = format.hidden, columns = choices + (shared != Py_None);
        const float* in = floats(held, x, "x", tokens * hidden);
        const float* weights = floats(held, routing_weights, "routing_weights", tokens * columns);
        float* out = floats(held, y, "y", tokens * hidden, true);
        std::vector<ExpertUses> all = uses_of(held, format, records, rows, tokens, choices, shared, weights);
        if (tokens == 1) // an expert that is chosen twice runs once, with both weights
            for (ExpertUses& one : all)
                for (; one.uses.size() > 1; one.uses.pop_back())
                    one.uses[0].routing_weight += one.uses.back().routing_weight;
        WithoutGil released;
        apply_experts(all, in, tokens, hidden, out, type);
    });
}

PyObject* outputs_of_experts(PyObject*, PyObject* args) {
    PyObject *x, *records, *form, *rows, *shared, *outputs;
    long long tokens, choices, columns;
    if (!PyArg_ParseTuple(args, "OLO!O!OLOLO", &x, &tokens, &PyList_Type, &records, &PyTuple_Type, &form, &rows,
                          &choices, &shared, &columns, &outputs))
        return nullptr;
    return guarded([&] {
        Held held;
        require(tokens >= 0 && tokens <= kFewTokens && choices >= 0, "tokens and choices out of range");
        require(columns >= choices + (shared != Py_None), "more choices than columns");
        const Format format(form);
        const float* in = floats(held, x, "x", tokens * format.hidden);
        float* out = floats(held, outputs, "outputs", tokens * columns * format.hidden, true);
        const std::vector<ExpertUses> all = uses_of(held, format, records, rows, tokens, choices, shared, nullptr);
        for (const ExpertUses& one : all)
            require(tokens > 1 || one.uses.size() == 1, "a token chooses an expert twice");
        WithoutGil released;
        expert_outputs(all, in, tokens, format.hidden, columns, out);
    });
}

PyObject* sum_outputs(PyObject*, PyObject* args) {
    PyObject *outputs, *routing_weights, *y;
    long long tokens, columns, hidden;
    if (!PyArg_ParseTuple(args, "OOLLLO", &outputs, &routing_weights, &tokens, &columns, &hidden, &y)) return nullptr;
    return guarded([&] {
        Held held;
        require(tokens >= 0 && columns >= 0 && hidden > 0, "sizes out of range");
        const float* in = floats(held, outputs, "outputs", tokens * columns * hidden);
        const float* weights = floats(held, routing_weights, "routing_weights", tokens * columns);
        float* out = floats(held, y, "y", tokens * hidden, true);
        WithoutGil released;
        add_outputs(in, weights, tokens, columns, hidden, out);
    });
}

// Return how many sequences are in a list, and check that another list is as long.
Py_ssize_t sequences_in(PyObject* first, PyObject* second) {
    const Py_ssize_t count = PyList_Size(first);
    require(PyList_Size(second) == count, "lists of sequences must be equally long");
    return count;
}

// Return the number of new tokens of each of `count` sequences.
std::vector<int64_t> lengths_of(PyObject* list, Py_ssize_t count) {
    require(PyList_Size(list) == count, "lists of sequences must be equally long");
    std::vector<int64_t> lengths;
    for (Py_ssize_t i = 0; i < count; ++i) {
        const long long length = PyLong_AsLongLong(PyList_GetItem(list, i));
        if (length == -1 && PyErr_Occurred()) throw PythonError{};
        require(length >= 0, "lengths and positions must not be negative");
        lengths.push_back(length);
    }
    return lengths;
}

int64_t sum_of(const std::vector<int64_t>& values) {
    int64_t total = 0;
    for (int64_t value : values) total += value;
    return total;
}

PyObject* delta_net(PyObject*, PyObject* args) {
    PyObject *qkv, *z, *b, *a, *lengths, *convolution, *a_log, *dt_bias, *norm, *conv_states, *recurrent_states, *y;
    long long key_heads, value_heads, key_dim, value_dim, taps;
    float eps;
    if (!PyArg_ParseTuple(args, "OOOOO!OOOO(LLLLL)fO!O!O", &qkv, &z, &b, &a, &PyList_Type, &lengths, &convolution,
                          &a_log, &dt_bias, &norm, &key_heads, &value_heads, &key_dim, &value_dim, &taps, &eps,
                          &PyList_Type, &conv_states, &PyList_Type, &recurrent_states, &y))
        return nullptr;
    return guarded([&] {
        Held held;
        require(key_heads > 0 && value_heads > 0 && value_heads % key_heads == 0, "heads do not fit");
        require(key_dim > 0 && value_dim > 0 && key_dim % kLanes == 0 && value_dim % kLanes == 0,
                "head sizes must be multiples of 16");
        require(taps > 0, "taps out of range");
        const DeltaShape shape{key_heads, value_heads, key_dim, value_dim, taps};
        const int64_t channels = shape.channels();
        const DeltaLayer layer{shape, floats(held, convolution, "convolution", channels * taps),
                               floats(held, a_log, "a_log", value_heads), floats(held, dt_bias, "dt_bias", value_heads),
                               floats(held, norm, "norm", value_dim), eps};
        const Py_ssize_t count = sequences_in(conv_states, recurrent_states);
        const std::vector<int64_t> tokens_of = lengths_of(lengths, count);
        const int64_t tokens = sum_of(tokens_of);
        const float* in[4] = {floats(held, qkv, "qkv", tokens * channels),
                              floats(held, z, "z", tokens * shape.value_width()),
                              floats(held, b, "b", tokens * value_heads), floats(held, a, "a", tokens * value_heads)};
        std::vector<DeltaSequence> sequences;
        for (Py_ssize_t i = 0; i < count; ++i)
            sequences.push_back({tokens_of[i],
                                 floats(held, PyList_GetItem(conv_states, i), "conv_state", (taps - 1) * channels, true),
                                 floats(held, PyList_GetItem(recurrent_states, i), "recurrent_state",
                                        value_heads * value_dim * key_dim, true)});
        float* out = floats(held, y, "y", tokens * shape.value_width(), true);
        WithoutGil released;
        gated_delta_net(layer, in[0], in[1], in[2], in[3], sequences, out);
    });
}

PyObject* attention(PyObject*, PyObject* args) {
    PyObject *q_and_gate, *k, *v, *lengths, *starts, *capacities, *q_norm, *k_norm, *frequencies, *keys, *values, *y;
    long long heads, kv_heads, dim, rotary;
    int bits, row_group, gated;
    float eps;
    if (!PyArg_ParseTuple(args, "OOOO!O!O!OO(LLLLii)OfpO!O!O", &q_and_gate, &k, &v, &PyList_Type, &lengths, &PyList_Type,
                          &starts, &PyList_Type, &capacities, &q_norm, &k_norm, &heads, &kv_heads, &dim, &rotary, &bits,
                          &row_group, &frequencies, &eps, &gated, &PyList_Type, &keys, &PyList_Type, &values, &y))
        return nullptr;
    return guarded([&] {
        Held held;
        require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads do not fit");
        require(dim > 0 && dim % kLanes == 0 && rotary > 0 && rotary % 2 == 0 && rotary <= dim,
                "the head size must be a multiple of 16, and rotated dimensions even");
        require(bits == 32 || bits == 16 || bits == 8 || bits == 4, "keys and values have 32, 16, 8 or 4 bits");
        require(bits > 8 || (row_group > 0 && row_group % kLanes == 0 && dim % row_group == 0),
                "the head size must be a multiple of the group, and the group of 16");
        const RowFormat rows{bits, row_group, dim};
        const Elements& elements = bits == 32 ? kFloat : bits == 16 ? kBrainFloat : kCodes;
        const Py_ssize_t count = sequences_in(keys, values);
        const std::vector<int64_t> tokens_of = lengths_of(lengths, count), start_of = lengths_of(starts, count),
                                   capacity_of = lengths_of(capacities, count);
        const int64_t tokens = sum_of(tokens_of);
        held.push_back(std::make_unique<Buffer>(frequencies, "frequencies", kDouble, rotary / 2));
        const double* turned = held.back()->as<double>();
        const AttentionLayer layer{{heads, kv_heads, dim, rotary}, rows, turned, eps, gated != 0,
                                   floats(held, q_norm, "q_norm", dim), floats(held, k_norm, "k_norm", dim)};
        const float* in[3] = {floats(held, q_and_gate, "q_and_gate", tokens * heads * layer.query_width()),
                              floats(held, k, "k", tokens * kv_heads * dim),
                              floats(held, v, "v", tokens * kv_heads * dim)};
        std::vector<AttentionSequence> sequences;
        for (Py_ssize_t i = 0; i < count; ++i) {
            require(start_of[i] + tokens_of[i] <= capacity_of[i], "a cache has no room for its tokens");
            const int64_t size = kv_heads * capacity_of[i] * rows.row_bytes() / elements.bytes;
            uint8_t* caches[2];
            for (int part : {0, 1}) {
                held.push_back(std::make_unique<Buffer>(PyList_GetItem(part ? values : keys, i),
                                                        part ? "values" : "keys", elements, size, true));
                caches[part] = held.back()->as<uint8_t>();
                require(reinterpret_cast<uintptr_t>(caches[part]) % 4 == 0, "a cache is not aligned");
            }
            sequences.push_back({tokens_of[i], start_of[i], capacity_of[i], caches[0], caches[1]});
        }
        float* out = floats(held, y, "y", tokens * heads * dim, true);
        WithoutGil released;
        gated_attention(layer, in[0], in[1], in[2], sequences, out);
    });
}

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(operations().name); }

PyObject* names_of(const std::vector<const Operations*>& sets) {
    PyObject* names = PyList_New(0);
    if (!names) return nullptr;
    for (const Operations* found : sets) {
        PyObject* name = PyUnicode_FromString(found->name);
        if (!name || PyList_Append(names, name) != 0) {
            Py_XDECREF(name);
            Py_DECREF(names);
            return nullptr;
        }
        Py_DECREF(name);
    }
    return names;
}

PyObject* instruction_sets(PyObject*, PyObject*) { return names_of(all_operations()); }

PyObject* instruction_sets_in_use(PyObject*, PyObject*) { return names_of(operations_in_use()); }

PyObject* use_instruction_set(PyObject*, PyObject* args) {
    const char* name;
    if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
    return guarded([&] { require(choose_operations(name), "this machine, or this build, has no such instruction set"); });
}

PyObject* use_for_products(PyObject*, PyObject* args) {
    long long vectors;
    int activations, bits, group;
    const char* name;
    if (!PyArg_ParseTuple(args, "Liiis", &vectors, &activations, &bits, &group, &name)) return nullptr;
    return guarded([&] {
        require(vectors >= 1, "the number of vectors is out of range");
        const Activations type = checked(activations);
        check_format(1, group, bits, group, 0);
        require(choose_for_products(vectors, type, bits, group, name),
                "this machine, or this build, has no such instruction set");
    });
}

PyObject* use_threads(PyObject*, PyObject* args) {
    int count;
    if (!PyArg_ParseTuple(args, "i", &count)) return nullptr;
    return guarded([&] {
        WithoutGil released;
        set_threads(count);
    });
}

PyObject* thread_count(PyObject*, PyObject*) { return PyLong_FromLong(threads()); }

PyObject* largest_values(PyObject*, PyObject* args) {
    PyObject *values, *lengths, *indices;
    long long rows, columns, count;
    if (!PyArg_ParseTuple(args, "OOLLLO", &values, &lengths, &rows, &columns, &count, &indices)) return nullptr;
    return guarded([&] {
        Held held;
        require(rows >= 0 && columns > 0 && count > 0, "sizes out of range");
        const float* in = floats(held, values, "values", rows * columns);
        held.push_back(std::make_unique<Buffer>(lengths, "lengths", kInt, rows));
        const int32_t* own = held.back()->as<const int32_t>();
        for (int64_t row = 0; row < rows; ++row)
            require(own[row] >= count && own[row] <= columns, "a row has too few or too many values");
        held.push_back(std::make_unique<Buffer>(indices, "indices", kInt, rows * count, true));
        int32_t* out = held.back()->as<int32_t>();
        WithoutGil released;
        largest(in, own, rows, columns, count, out);
    });
}

PyObject* supports_activations(PyObject*, PyObject* args) {
    int type;
    if (!PyArg_ParseTuple(args, "i", &type)) return nullptr;
    return PyBool_FromLong(is_activations(type));
}

PyMethodDef methods[] = {
    {"products", products, METH_VARARGS,
     "products(x, tokens, matrices, results, add, activations): each result = (or +=) x times the transpose of its matrix"},
    {"large_pages", large_pages, METH_VARARGS, "large_pages(y, count): ask for large pages for y, before its first use"},
    {"fill", fill, METH_VARARGS, "fill(y, values, count): y = values, or zeros for None"},
    {"rms_norm", norm, METH_VARARGS, "rms_norm(x, tokens, width, weight, eps, y)"},
    {"experts", experts, METH_VARARGS,
     "experts(x, tokens, records, format, rows, routing_weights, choices, shared, y, activations): y += weighted outputs"},
    {"expert_outputs", outputs_of_experts, METH_VARARGS,
     "expert_outputs(x, tokens, records, format, rows, choices, shared, columns, outputs): outputs, without weights"},
    {"add_outputs", sum_outputs, METH_VARARGS,
     "add_outputs(outputs, routing_weights, tokens, columns, hidden, y): y += weighted outputs"},
    {"delta_net", delta_net, METH_VARARGS,
     "delta_net(qkv, z, b, a, lengths, convolution, a_log, dt_bias, norm, shape, eps, conv_states, recurrent_states, y): "
     "the new tokens of several sequences, one sequence after the other"},
    {"attention", attention, METH_VARARGS,
     "attention(q_and_gate, k, v, lengths, starts, capacities, q_norm, k_norm, shape, frequencies, eps, gated, keys, values, y): "
     "the new tokens of several sequences, one sequence after the other"},
    {"largest", largest_values, METH_VARARGS,
     "largest(values, lengths, rows, columns, count, indices): indices of the largest of the first values of each row"},
    {"has_activations", supports_activations, METH_VARARGS,
     "Return whether products of many vectors can take vectors of type 0 (f32), 1 (bf16) or 2 (int8)."},
    {"instruction_set", instruction_set, METH_NOARGS, "The name of the one in use."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Those that this machine has, the best first."},
    {"instruction_sets_in_use", instruction_sets_in_use, METH_NOARGS, "Those that some operation uses."},
    {"use_instruction_set", use_instruction_set, METH_VARARGS, "Use one by name; \"auto\" is the best."},
    {"use_for_products", use_for_products, METH_VARARGS,
     "use_for_products(vectors, activations, bits, group, name): use an instruction set for products of one vector, of a "
     "few, or of many vectors of a type"},
    {"use_threads", use_threads, METH_VARARGS, "Share work among so many threads, the caller included."},
    {"threads", thread_count, METH_NOARGS, "Return the number of threads."},
    {nullptr, nullptr, 0, nullptr},
};

constexpr int kInterface = 14; // see __init__.py

int add_constants(PyObject* module) {
    return PyModule_AddIntConstant(module, "INTERFACE", kInterface) ||
                   PyModule_AddIntConstant(module, "FEW_TOKENS", kFewTokens) ||
                   PyModule_AddIntConstant(module, "MOST_THREADS", kMostThreads)
               ? -1
               : 0;
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(add_constants)}, {0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Kernels for CPUs.", 0, methods, slots, nullptr, nullptr,
                          nullptr};

} // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&definition); }
