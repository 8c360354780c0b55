// The one MLX primitive behind all CPU operations of graft-ops.
//
// It knows no formula. It holds an operation that Rust made, allocates the outputs, and hands raw memory to Rust on the
// stream's own thread; the gradient is a graph that Rust builds. Everything Rust passes in is documented in src/cpu/primitive.rs.

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/stream.h"

namespace mx = mlx::core;

extern "C" {

struct GraftTensor {
  void* data;
  size_t size; // elements
  uint32_t dtype; // as in mlx/c/array.h, whose order is that of mlx::core::Dtype::Val
};

struct GraftStrided {
  const int* shape;
  const int64_t* strides;
  size_t dims;
  size_t item;
};

struct GraftBackward {
  void* const* primals;
  size_t primal_count;
  void* const* cotangents; // one for each output
  void* const* outputs;
  size_t output_count;
  const int* wanted; // the primals that need a gradient
  size_t wanted_count;
};

struct GraftHooks {
  const char* (*name)(const void* op);
  void (*drop)(void* op);
  int (*takes_over)(const void* op, size_t output); // an input, or -1
  int (*lasts)(const void* op); // whether the outputs are read again and again from now on
  int (*run)(
      const void* op, const GraftTensor* in, size_t n, GraftTensor* out, size_t m, char* message, size_t capacity);
  void (*copy)(const char* from, char* to, const GraftStrided* layout);
  int (*gradients)(const void* op, const GraftBackward* request, void** gradients, char* message, size_t capacity);
};

struct GraftShape {
  const int* dims;
  size_t count;
  uint32_t dtype;
};
}

namespace {

mx::Dtype dtype_of(uint32_t code) {
  switch (static_cast<mx::Dtype::Val>(code)) {
    case mx::Dtype::Val::float32:
      return mx::float32;
    case mx::Dtype::Val::float16:
      return mx::float16;
    case mx::Dtype::Val::bfloat16:
      return mx::bfloat16;
    case mx::Dtype::Val::int32:
      return mx::int32;
    case mx::Dtype::Val::uint8:
      return mx::uint8;
    case mx::Dtype::Val::uint32:
      return mx::uint32;
    default:
      throw std::invalid_argument("graft: an operation asked for an output type it cannot have");
  }
}

constexpr size_t LINE = 64;
constexpr size_t PIECE = 32 << 20;

// Memory in which arrays stand that last. Weights are read from end to end for each token, some hundred kilobytes an array, and
// in pages of 4 kB the processor spends a good part of that on finding the pages. So they stand one after the other, on whole
// lines, in pieces for which the system is asked for large pages. A piece is freed with the last array in it.
struct Piece {
  explicit Piece(size_t size) : buffer(mx::allocator::malloc(size)) {
    if (buffer.ptr() == nullptr) {
      throw std::bad_alloc();
    }
    auto start = reinterpret_cast<uintptr_t>(buffer.raw_ptr());
    used = (LINE - start % LINE) % LINE;
    end = size;
#if defined(MADV_HUGEPAGE)
    uintptr_t page = sysconf(_SC_PAGESIZE);
    uintptr_t from = (start + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(from), (start + size - from) / page * page, MADV_HUGEPAGE);
#endif
  }
  Piece(const Piece&) = delete;
  ~Piece() {
    mx::allocator::free(buffer);
  }

  mx::allocator::Buffer buffer;
  size_t used, end;
};

// Gives an output its place.
void place(mx::array& output) {
  static std::mutex mutex;
  static std::weak_ptr<Piece> current;
  std::lock_guard<std::mutex> lock(mutex);
  size_t size = (output.nbytes() + LINE - 1) / LINE * LINE;
  auto piece = current.lock();
  if (!piece || piece->used + size > piece->end) {
    // One that would fill the better part of a piece has one of its own, and what is left of the other stays in use.
    bool own = size > PIECE / 2;
    piece = std::make_shared<Piece>(own ? size + LINE : PIECE);
    if (!own) {
      current = piece;
    }
  }
  const auto& shape = output.shape();
  bool column = output.size() == static_cast<size_t>(*std::max_element(shape.begin(), shape.end()));
  auto keep = [piece](mx::allocator::Buffer) {};
  output.set_data(piece->buffer, output.size(), output.strides(), {true, true, column}, piece->used, keep);
  piece->used += size;
}

class GraftPrimitive : public mx::Primitive {
 public:
  GraftPrimitive(mx::Stream stream, void* op, const GraftHooks* hooks)
      : mx::Primitive(stream), op_(op, hooks->drop), hooks_(hooks) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    std::vector<GraftTensor> in, out;
    in.reserve(inputs.size());
    for (const auto& input : inputs) {
      in.push_back(input.flags().row_contiguous ? view(input) : copied(input, encoder));
    }
    for (size_t i = 0; i < outputs.size(); i++) {
      auto& output = outputs[i];
      int from = hooks_->takes_over(op_.get(), i);
      if (from >= 0 && inputs[from].is_donatable() && inputs[from].flags().row_contiguous &&
          inputs[from].nbytes() == output.nbytes()) {
        output.copy_shared_buffer(inputs[from]);
      } else if (hooks_->lasts(op_.get()) && output.size() > 0) {
        place(output);
      } else {
        output.set_data(mx::allocator::malloc(output.nbytes()));
      }
      out.push_back(view(output));
    }
    // MLX keeps the buffers of inputs and outputs alive until the stream has passed this task.
    encoder.dispatch([op = op_, hooks = hooks_, in = std::move(in), out = std::move(out)]() mutable {
      char message[512] = {0};
      if (hooks->run(op.get(), in.data(), in.size(), out.data(), out.size(), message, sizeof(message)) != 0) {
        throw std::runtime_error(std::string("graft: the operation ") + hooks->name(op.get()) + " failed: " + message);
      }
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string("graft: the operation ") + name() + " runs on a CPU only");
  }

  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override {
    auto handles = [](const std::vector<mx::array>& arrays) {
      // Copies of the references, as mlx-c's handles are; Rust frees them.
      std::vector<void*> raw;
      for (const auto& array : arrays) {
        raw.push_back(new mx::array(array));
      }
      return raw;
    };
    auto ins = handles(primals), cots = handles(cotangents), outs = handles(outputs);
    GraftBackward request{
        ins.data(), ins.size(), cots.data(), outs.data(), outs.size(), argnums.data(), argnums.size()};
    std::vector<void*> gradients(argnums.size(), nullptr);
    char message[512] = {0};
    int status = hooks_->gradients(op_.get(), &request, gradients.data(), message, sizeof(message));
    std::vector<mx::array> result;
    for (void* gradient : gradients) {
      if (gradient != nullptr) {
        auto* array = static_cast<mx::array*>(gradient);
        result.push_back(*array);
        delete array;
      }
    }
    if (status != 0 || result.size() != argnums.size()) {
      throw std::runtime_error(std::string("graft: gradient of ") + name() + ": " + message);
    }
    return result;
  }

  const char* name() const override {
    return hooks_->name(op_.get());
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    auto* same = dynamic_cast<const GraftPrimitive*>(&other);
    return same != nullptr && op_ == same->op_;
  }

  // output_shapes stays MLX's own, which refuses: shapes are fixed when Rust builds the graph, so a
  // shapeless compilation has to fail rather than reuse them.

 private:
  static GraftTensor view(const mx::array& array) {
    auto* data = const_cast<char*>(array.data<char>());
    return {data, array.size(), static_cast<uint32_t>(array.dtype().val())};
  }

  // A row-major copy of an input that is a transposed or broadcast view, made on the stream before the operation.
  GraftTensor copied(const mx::array& input, mx::cpu::CommandEncoder& encoder) const {
    mx::array copy(input.shape(), input.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(copy.nbytes()));
    encoder.dispatch([hooks = hooks_,
                      from = input.data<char>(),
                      to = copy.data<char>(),
                      shape = std::vector<int>(input.shape().begin(), input.shape().end()),
                      strides = std::vector<int64_t>(input.strides().begin(), input.strides().end()),
                      item = input.itemsize()]() {
      GraftStrided layout{shape.data(), strides.data(), shape.size(), item};
      hooks->copy(from, to, &layout);
    });
    auto tensor = view(copy);
    encoder.add_temporary(std::move(copy));
    return tensor;
  }

  std::shared_ptr<void> op_;
  const GraftHooks* hooks_;
};

} // namespace

// Builds the outputs of `op` (which it owns from here on) over `inputs`; 0, or 1 and a message.
extern "C" int graft_apply(
    void* op,
    const GraftHooks* hooks,
    const void* stream,
    const void* const* inputs,
    size_t n,
    const GraftShape* shapes,
    size_t m,
    void** outputs,
    char* message,
    size_t capacity) {
  try {
    auto wanted = *static_cast<const mx::Stream*>(stream);
    if (wanted.device != mx::Device::cpu) {
      wanted = mx::default_stream(mx::Device::cpu);
    }
    auto primitive = std::make_shared<GraftPrimitive>(wanted, op, hooks);
    std::vector<mx::array> in;
    for (size_t i = 0; i < n; i++) {
      in.push_back(*static_cast<const mx::array*>(inputs[i]));
    }
    std::vector<mx::Shape> out_shapes;
    std::vector<mx::Dtype> out_types;
    for (size_t i = 0; i < m; i++) {
      out_shapes.emplace_back(shapes[i].dims, shapes[i].dims + shapes[i].count);
      out_types.push_back(dtype_of(shapes[i].dtype));
    }
    auto out = mx::array::make_arrays(std::move(out_shapes), out_types, primitive, in);
    for (size_t i = 0; i < m; i++) {
      outputs[i] = new mx::array(std::move(out[i]));
    }
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), capacity - 1);
    return 1;
  }
}

// MLX takes the memory of its arrays from malloc. Left to itself, glibc raises the size from which memory goes back to the
// system at once up to 32 MB, keeps several heaps, and gives none of their holes back: a training step then holds half as much
// again as its arrays. Small arrays stay in one heap, large ones go back.
extern "C" void graft_set_allocator() {
#if defined(__GLIBC__)
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_MMAP_THRESHOLD, 8 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}
