//! The one MLX primitive behind our CPU operations: an [`Op`], which C++ (shim/primitive.cpp) holds and calls.

use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::ffi::stream;
use crate::{Array, Dtype, Exception, Result};

/// An operation on the memory of its inputs and outputs. Shapes and types were checked when the graph was built, so
/// running cannot fail.
pub(crate) trait Op: Send + Sync + 'static {
    /// For messages.
    fn name(&self) -> &'static CStr;

    /// Computes the outputs, on MLX's stream thread. Everything is row-major.
    fn run(&self, inputs: &[Tensor], outputs: &mut [Tensor]);

    /// The gradients with respect to the primals that `call.wanted` names, as a graph, in that order.
    fn gradients(&self, call: &Backward) -> Result<Vec<Array>> {
        Err(Exception::custom(format!(
            "{} has no gradient with respect to its inputs {:?}",
            self.name().to_string_lossy(),
            call.wanted
        )))
    }

    /// The input whose memory output `output` may take over if nobody else needs it: same size, and `run` reads each
    /// part of it before it writes there. `run` finds equal addresses if that happened.
    fn takes_over(&self, output: usize) -> Option<usize> {
        let _ = output;
        None
    }

    /// Whether the outputs are read again and again from now on, as weights are.
    fn lasts(&self) -> bool {
        false
    }
}

/// What a gradient is made of.
pub(crate) struct Backward {
    /// The inputs of the operation.
    pub(crate) primals: Vec<Array>,
    /// The gradient of the loss by each output.
    pub(crate) cotangents: Vec<Array>,
    /// Which primals need a gradient.
    pub(crate) wanted: Vec<usize>,
    /// The outputs.
    pub(crate) outputs: Vec<Array>,
}

impl Backward {
    /// Those of `all`, the gradients of inputs 0, 1, ..., that are wanted.
    pub(crate) fn choose(&self, all: &[Array]) -> Result<Vec<Array>> {
        let pick = |&i: &usize| {
            let gradient = all.get(i).cloned();
            gradient.ok_or_else(|| Exception::custom(format!("input {i} has no gradient")))
        };
        self.wanted.iter().map(pick).collect()
    }
}

/// Memory of an input or an output.
#[repr(C)]
pub(crate) struct Tensor {
    data: *mut c_void,
    size: usize,
    dtype: u32,
}

/// Numbers of one float type.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    Bf16(&'a [u16]),
    /// Powers of two, see [`crate::minifloat`].
    E8m0(&'a [u8]),
    E4m3(&'a [u8]),
}

impl<'a> Floats<'a> {
    /// Some of the numbers.
    pub(crate) fn part(self, range: Range<usize>) -> Floats<'a> {
        match self {
            Floats::F32(all) => Floats::F32(&all[range]),
            Floats::F16(all) => Floats::F16(&all[range]),
            Floats::Bf16(all) => Floats::Bf16(&all[range]),
            Floats::E8m0(all) => Floats::E8m0(&all[range]),
            Floats::E4m3(all) => Floats::E4m3(&all[range]),
        }
    }
}

impl Tensor {
    fn check(&self, dtype: Dtype) {
        assert_eq!(
            self.dtype, dtype as u32,
            "an operation got an array of another type than it was built for"
        );
    }

    /// # Safety
    /// T must be what the type code says.
    unsafe fn slice<T>(&self) -> &[T] {
        if self.size == 0 {
            return &[];
        }
        // SAFETY: MLX keeps `size` elements alive during the run; nobody writes them meanwhile.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.size) }
    }

    pub(crate) fn f32(&self) -> &[f32] {
        self.check(Dtype::Float32);
        // SAFETY: checked.
        unsafe { self.slice() }
    }

    pub(crate) fn u32(&self) -> &[u32] {
        self.check(Dtype::Uint32);
        // SAFETY: checked.
        unsafe { self.slice() }
    }

    pub(crate) fn i32(&self) -> &[i32] {
        self.check(Dtype::Int32);
        // SAFETY: checked.
        unsafe { self.slice() }
    }

    pub(crate) fn floats(&self) -> Floats<'_> {
        // SAFETY: T has the size and kind of each type code.
        unsafe {
            match self.dtype {
                code if code == Dtype::Float16 as u32 => Floats::F16(self.slice()),
                code if code == Dtype::Bfloat16 as u32 => Floats::Bf16(self.slice()),
                _ => Floats::F32(self.f32()),
            }
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        if self.size == 0 {
            return &[];
        }
        // SAFETY: any memory may be read as bytes.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.nbytes()) }
    }

    /// An output's memory.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        if self.size == 0 {
            return &mut [];
        }
        // SAFETY: MLX allocated it for this run; any bytes are numbers.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.nbytes()) }
    }

    fn nbytes(&self) -> usize {
        let is = |dtype: Dtype| self.dtype == dtype as u32;
        let halves = is(Dtype::Float16) || is(Dtype::Bfloat16);
        self.size
            * if is(Dtype::Uint8) {
                1
            } else if halves {
                2
            } else {
                4
            }
    }

    /// An output's memory.
    pub(crate) fn f32_mut(&mut self) -> &mut [f32] {
        self.check(Dtype::Float32);
        if self.size == 0 {
            return &mut [];
        }
        // SAFETY: MLX allocated it for this run, or handed over an input that no one else has.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.size) }
    }

    /// Whether both are one memory, after [`Op::takes_over`].
    pub(crate) fn is(&self, other: &Tensor) -> bool {
        std::ptr::eq(self.data, other.data)
    }
}

/// The outputs, of the shapes and types given, of `op` on `inputs`. Nothing is computed yet.
pub(crate) fn apply(op: impl Op, inputs: &[&Array], outputs: &[(&[i32], Dtype)]) -> Result<Vec<Array>> {
    let op: Box<dyn Op> = Box::new(op);
    let op = Box::into_raw(Box::new(op)).cast::<c_void>();
    let inputs: Vec<*const c_void> = inputs.iter().map(|array| array.as_ptr().ctx.cast_const()).collect();
    let shapes: Vec<Shape> = outputs
        .iter()
        .map(|(shape, dtype)| Shape { dims: shape.as_ptr(), count: shape.len(), dtype: *dtype as u32 })
        .collect();
    let mut made = vec![std::ptr::null_mut(); outputs.len()];
    let mut message = [0 as c_char; 512];
    let stream = stream();
    // SAFETY: `op` is given away; all pointers live through the call and hold as many elements as they say.
    let status = unsafe {
        graft_apply(
            op,
            &HOOKS,
            stream.as_ptr().ctx.cast_const(),
            inputs.as_ptr(),
            inputs.len(),
            shapes.as_ptr(),
            shapes.len(),
            made.as_mut_ptr(),
            message.as_mut_ptr(),
            message.len(),
        )
    };
    if status != 0 {
        // SAFETY: the shim ends the message with a zero.
        let text = unsafe { CStr::from_ptr(message.as_ptr()) };
        return Err(Exception::custom(text.to_string_lossy().into_owned()));
    }
    // SAFETY: each handle is a new reference, which `Array` frees.
    Ok(made.into_iter().map(|ctx| unsafe { Array::from_ptr(mlx_sys::mlx_array { ctx }) }).collect())
}

/// [`apply`] for a single output.
pub(crate) fn apply_one(op: impl Op, inputs: &[&Array], shape: &[i32], dtype: Dtype) -> Result<Array> {
    Ok(apply(op, inputs, &[(shape, dtype)])?.swap_remove(0))
}

#[repr(C)]
struct Shape {
    dims: *const i32,
    count: usize,
    dtype: u32,
}

#[repr(C)]
struct Strided {
    shape: *const i32,
    strides: *const i64,
    dims: usize,
    item: usize,
}

#[repr(C)]
struct BackwardRequest {
    primals: *const *mut c_void,
    primal_count: usize,
    cotangents: *const *mut c_void,
    outputs: *const *mut c_void,
    output_count: usize,
    wanted: *const c_int,
    wanted_count: usize,
}

#[repr(C)]
struct Hooks {
    name: extern "C" fn(*const c_void) -> *const c_char,
    drop: extern "C" fn(*mut c_void),
    takes_over: extern "C" fn(*const c_void, usize) -> c_int,
    lasts: extern "C" fn(*const c_void) -> c_int,
    run: unsafe extern "C" fn(
        *const c_void,
        *const Tensor,
        usize,
        *mut Tensor,
        usize,
        *mut c_char,
        usize,
    ) -> c_int,
    copy: unsafe extern "C" fn(*const u8, *mut u8, *const Strided),
    gradients: unsafe extern "C" fn(
        *const c_void,
        *const BackwardRequest,
        *mut *mut c_void,
        *mut c_char,
        usize,
    ) -> c_int,
}

/// Lets the system's allocator give large arrays back.
pub(crate) fn set_allocator() {
    graft_set_allocator();
}

static HOOKS: Hooks = Hooks {
    name: name_hook,
    drop: drop_hook,
    takes_over: takes_over_hook,
    lasts: lasts_hook,
    run: run_hook,
    copy: copy_hook,
    gradients: gradients_hook,
};

unsafe extern "C" {
    safe fn graft_set_allocator();
    fn graft_apply(
        op: *mut c_void,
        hooks: *const Hooks,
        stream: *const c_void,
        inputs: *const *const c_void,
        input_count: usize,
        shapes: *const Shape,
        output_count: usize,
        outputs: *mut *mut c_void,
        message: *mut c_char,
        capacity: usize,
    ) -> c_int;
}

/// The operation behind a pointer of [`apply`]'s.
fn op<'a>(pointer: *const c_void) -> &'a dyn Op {
    // SAFETY: C++ calls back only with the pointer that `apply` gave it, before it calls `drop_hook`.
    unsafe { &**pointer.cast::<Box<dyn Op>>() }
}

extern "C" fn name_hook(pointer: *const c_void) -> *const c_char {
    op(pointer).name().as_ptr()
}

extern "C" fn drop_hook(pointer: *mut c_void) {
    // SAFETY: called once, with the box of `apply`. A panicking drop must not unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(pointer.cast::<Box<dyn Op>>()) })));
}

extern "C" fn takes_over_hook(pointer: *const c_void, output: usize) -> c_int {
    op(pointer).takes_over(output).map_or(-1, |input| input as c_int)
}

extern "C" fn lasts_hook(pointer: *const c_void) -> c_int {
    op(pointer).lasts().into()
}

unsafe extern "C" fn run_hook(
    pointer: *const c_void,
    inputs: *const Tensor,
    input_count: usize,
    outputs: *mut Tensor,
    output_count: usize,
    message: *mut c_char,
    capacity: usize,
) -> c_int {
    // SAFETY: the shim's vectors, which hold at least one element each.
    let (inputs, outputs) = unsafe {
        (
            std::slice::from_raw_parts(inputs, input_count),
            std::slice::from_raw_parts_mut(outputs, output_count),
        )
    };
    match catch_unwind(AssertUnwindSafe(|| op(pointer).run(inputs, outputs))) {
        Ok(()) => 0,
        Err(panic) => {
            // SAFETY: the shim's buffer.
            unsafe { tell(&panic_text(panic.as_ref()), message, capacity) };
            1
        }
    }
}

/// Leaves a text for C++, which makes an exception of it.
///
/// # Safety
/// `message` must hold `capacity` bytes, all zero.
unsafe fn tell(text: &str, message: *mut c_char, capacity: usize) {
    let length = text.len().min(capacity.saturating_sub(1));
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), message.cast(), length) };
}

unsafe extern "C" fn copy_hook(from: *const u8, to: *mut u8, layout: *const Strided) {
    // SAFETY: the shim describes an array of MLX's, whose every element it may read, and memory for all of them.
    unsafe {
        let layout = &*layout;
        let shape = std::slice::from_raw_parts(layout.shape, layout.dims);
        let strides = std::slice::from_raw_parts(layout.strides, layout.dims);
        let mut to = to;
        copy_strided(from, &mut to, shape, strides, layout.item);
    }
}

/// Copies a strided array to `to` in row-major order and leaves `to` behind the last element.
unsafe fn copy_strided(from: *const u8, to: &mut *mut u8, shape: &[i32], strides: &[i64], item: usize) {
    // SAFETY: within the array, by the caller's description.
    unsafe {
        let (Some((&count, shape)), Some((&stride, strides))) = (shape.split_first(), strides.split_first())
        else {
            std::ptr::copy_nonoverlapping(from, *to, item);
            *to = to.add(item);
            return;
        };
        if shape.is_empty() && stride == 1 {
            std::ptr::copy_nonoverlapping(from, *to, item * count as usize);
            *to = to.add(item * count as usize);
            return;
        }
        for i in 0..i64::from(count) {
            copy_strided(from.offset((i * stride) as isize * item as isize), to, shape, strides, item);
        }
    }
}

unsafe extern "C" fn gradients_hook(
    pointer: *const c_void,
    request: *const BackwardRequest,
    gradients: *mut *mut c_void,
    message: *mut c_char,
    capacity: usize,
) -> c_int {
    // SAFETY: the shim's vectors; each handle in them is a new reference that becomes ours.
    let (call, gradients) = unsafe {
        let request = &*request;
        let arrays = |handles: *const *mut c_void, count: usize| -> Vec<Array> {
            (0..count).map(|i| Array::from_ptr(mlx_sys::mlx_array { ctx: *handles.add(i) })).collect()
        };
        let wanted = (0..request.wanted_count).map(|i| *request.wanted.add(i) as usize).collect();
        let call = Backward {
            primals: arrays(request.primals, request.primal_count),
            cotangents: arrays(request.cotangents, request.output_count),
            outputs: arrays(request.outputs, request.output_count),
            wanted,
        };
        (call, std::slice::from_raw_parts_mut(gradients, request.wanted_count))
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| op(pointer).gradients(&call)));
    let text = match outcome {
        Ok(Ok(made)) if made.len() == gradients.len() => {
            for (place, gradient) in gradients.iter_mut().zip(made) {
                *place = gradient.as_ptr().ctx;
                // The reference is C++'s now.
                std::mem::forget(gradient);
            }
            return 0;
        }
        Ok(Ok(made)) => format!("{} gradients for {} inputs", made.len(), gradients.len()),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic_text(panic.as_ref()),
    };
    // SAFETY: the shim's buffer.
    unsafe { tell(&text, message, capacity) };
    1
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken;

    impl Op for Broken {
        fn name(&self) -> &'static CStr {
            c"broken"
        }

        fn run(&self, inputs: &[Tensor], _: &mut [Tensor]) {
            let _ = inputs[0].i32();
        }
    }

    /// Fills its output with a number.
    struct Filled(f32);

    impl Op for Filled {
        fn name(&self) -> &'static CStr {
            c"filled"
        }

        fn run(&self, _: &[Tensor], outputs: &mut [Tensor]) {
            outputs[0].f32_mut().fill(self.0);
        }

        fn lasts(&self) -> bool {
            true
        }
    }

    #[test]
    fn what_lasts_stands_on_whole_lines_until_the_last_of_it_is_dropped() {
        graft_testkit::mlx(|| {
            let nothing = Array::from_f32(0.0);
            let filled = |x: f32, size: i32| {
                let y = apply_one(Filled(x), &[&nothing], &[size], Dtype::Float32).expect("a graph");
                let values = crate::ffi::read::<f32>(&y).expect("values");
                assert!(values.len() == size as usize && values.as_ptr().addr().is_multiple_of(64));
                y
            };
            let active = || mlx_rs::memory::active_memory().expect("MLX counts it");
            let before = active();
            // The last but one is larger than a piece; of each pair the second goes at once.
            let mut kept = Vec::new();
            for (i, size) in [3, 1000, 77, 9 << 20, 5].into_iter().enumerate() {
                kept.push((i as f32, filled(i as f32, size)));
                drop(filled(-1.0, size));
            }
            kept.remove(1);
            for (x, y) in &kept {
                assert!(crate::ffi::read::<f32>(y).expect("values").iter().all(|y| y == x));
            }
            let (_, last) = kept.pop().expect("the last");
            assert!(active() >= before + (68 << 20));
            drop(kept);
            assert!((before + (32 << 20)..before + (33 << 20)).contains(&active()));
            // The sum may take over the memory of what nobody else has.
            let sum = last.add(Array::from_f32(0.5)).expect("a sum");
            drop(last);
            assert_eq!(crate::ffi::read::<f32>(&sum).expect("values"), [4.5; 5]);
            drop(sum);
            assert!(active() < before + (1 << 20));
        });
    }

    #[test]
    fn a_panic_is_an_error_that_says_why() {
        graft_testkit::mlx(|| {
            let y = apply_one(Broken, &[&Array::from_f32(1.0)], &[1], Dtype::Float32);
            let e = y.and_then(|y| y.eval()).expect_err("it cannot run").to_string();
            assert!(e.contains("broken failed") && e.contains("another type than it was built for"), "{e}");
        });
    }
}
