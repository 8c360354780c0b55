//! Packed weights laid out for inference on a CPU, and products that round activations to 8 bits.

#[cfg(graft_cpu)]
use crate::cpu::{
    packed::Layout,
    panels::{self, ArrangedLookup, ArrangedMatmul, Arrangement},
    primitive::{apply, apply_one},
};
use crate::{Array, Dtype, Exception, PackedRef, Result, form, precision};

/// Packed weights W (out, in) in the layout that our CPU products of [`crate::Precision::Int16`] read. Made by [`arrange`].
#[derive(Debug, Clone)]
pub struct Arranged {
    /// Codes, scales and biases.
    parts: Vec<Array>,
    out: i32,
    inputs: i32,
    #[cfg(graft_cpu)]
    pub(crate) arrangement: Arrangement,
}

impl Arranged {
    /// (out, in)
    pub fn shape(&self) -> (i32, i32) {
        (self.out, self.inputs)
    }

    /// The arrays, for evaluation and for counting bytes.
    pub fn arrays(&self) -> &[Array] {
        &self.parts
    }
}

/// W laid out anew, if that pays here: our CPU form, the precision [`crate::Precision::Int16`], a processor that multiplies
/// bytes. The result takes as much memory, or somewhat more where W has 2, 3, 5 or 6 bits; W is not needed any more.
pub fn arrange(w: PackedRef) -> Result<Option<Arranged>> {
    #[cfg(graft_cpu)]
    if form() == crate::Form::Cpu && precision() == crate::Precision::Int16 && panels::pays() {
        let layout = Layout::of(w)?;
        let (out, inputs) = w.shape()?;
        let parts = panels::arrange(w)?;
        let arrangement = Arrangement::of(layout);
        return Ok(Some(Arranged { parts, out, inputs, arrangement }));
    }
    let _ = (w, form(), precision());
    Ok(None)
}

/// y = x W^T for x (..., in): (..., out), f32. With [`crate::Precision::Int16`] x is rounded to 16 bits by blocks of 32.
pub fn arranged_matmul(x: &Array, w: &Arranged) -> Result<Array> {
    Ok(arranged_matmuls(x, &[w])?.swap_remove(0))
}

/// [`arranged_matmul`] of one x with each of some W.
pub fn arranged_matmuls(x: &Array, ws: &[&Arranged]) -> Result<Vec<Array>> {
    for w in ws {
        if x.shape().last() != Some(&w.inputs) {
            let found = x.shape();
            return Err(Exception::custom(format!(
                "matmul: the last dimension must be {}, found {found:?}",
                w.inputs
            )));
        }
    }
    #[cfg(graft_cpu)]
    {
        let x = x.as_dtype(Dtype::Float32)?;
        let inputs: Vec<&Array> = std::iter::once(&x).chain(ws.iter().flat_map(|w| &w.parts)).collect();
        let shape = |w: &&Arranged| {
            let mut shape = x.shape().to_vec();
            shape.pop();
            shape.push(w.out);
            shape
        };
        let shapes: Vec<Vec<i32>> = ws.iter().map(shape).collect();
        let outputs: Vec<(&[i32], Dtype)> = shapes.iter().map(|shape| (&shape[..], Dtype::Float32)).collect();
        let arrangements = ws.iter().map(|w| w.arrangement).collect();
        apply(ArrangedMatmul { arrangements, precision: precision() }, &inputs, &outputs)
    }
    #[cfg(not(graft_cpu))]
    Err(Exception::custom("this build has no CPU operations of its own"))
}

/// Rows `ids` (N,) of W as (N, in) in f32. An id outside 0..out gives zeros.
pub fn arranged_rows(ids: &Array, w: &Arranged) -> Result<Array> {
    #[cfg(graft_cpu)]
    {
        let ids = ids.as_dtype(Dtype::Int32)?;
        let shape = [ids.size() as i32, w.inputs];
        let inputs: Vec<&Array> = std::iter::once(&ids).chain(&w.parts).collect();
        apply_one(ArrangedLookup { arrangement: w.arrangement }, &inputs, &shape, Dtype::Float32)
    }
    #[cfg(not(graft_cpu))]
    {
        let _ = (ids, w, Dtype::Float32);
        Err(Exception::custom("this build has no CPU operations of its own"))
    }
}
