//! Writes the logits (L, V) of a list of token ids, for comparison with another implementation.
//!
//! usage: logits MODEL_DIR 1,2,3 OUT.safetensors

use std::collections::BTreeMap;
use std::path::Path;

use graft_adapters::Route;
use graft_model::Model;
use graft_ops::{Array, Dtype, Rows};
use graft_quant::Tensor;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, ids, out] = arguments.as_slice() else { return Err("usage: logits MODEL_DIR IDS OUT".into()) };
    let ids: Vec<i32> = ids.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let model = Model::load(Path::new(dir), Dtype::Float32)?;
    let n = ids.len() as i32;
    let rows = Rows { lengths: vec![n], starts: vec![0] };
    let hidden = model.hidden(&Array::from_slice(&ids, &[n]), &rows, None, &Route::Base)?;
    let logits = model.logits(&hidden, &Route::Base)?;
    let tensors = BTreeMap::from([("logits".to_owned(), Tensor::from_array(&logits)?)]);
    graft_quant::write_atomic(Path::new(out), &graft_quant::safetensors_bytes(&tensors, &BTreeMap::new())?)?;
    Ok(())
}
