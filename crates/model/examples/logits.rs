//! Writes the logits (L, V) of a list of token ids, with an adapter perhaps, for comparison with another implementation.
//!
//! usage: logits MODEL_DIR 1,2,3 OUT.safetensors [ADAPTER_DIR]

use std::collections::BTreeMap;
use std::path::Path;

use graft_adapters::{AdapterSet, Route};
use graft_model::Model;
use graft_ops::{Array, Dtype, Rows};
use graft_quant::Tensor;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (dir, ids, out, adapter) = match arguments.as_slice() {
        [dir, ids, out] => (dir, ids, out, None),
        [dir, ids, out, adapter] => (dir, ids, out, Some(Path::new(adapter))),
        _ => return Err("usage: logits MODEL_DIR IDS OUT [ADAPTER_DIR]".into()),
    };
    let ids: Vec<i32> = ids.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let model = Model::load(Path::new(dir), Dtype::Float32)?;
    let n = ids.len() as i32;
    let rows = Rows { lengths: vec![n], starts: vec![0] };
    let table =
        adapter.map(|dir| AdapterSet::load(dir)?.table(dir, |path| model.target(path))).transpose()?;
    let route = table.as_ref().map_or(Route::Base, Route::Table);
    let hidden = model.hidden(&Array::from_slice(&ids, &[n]), &rows, None, &route)?;
    let logits = model.logits(&hidden, &route)?;
    let tensors = BTreeMap::from([("logits".to_owned(), Tensor::from_array(&logits)?)]);
    graft_quant::write_atomic(Path::new(out), &graft_quant::safetensors_bytes(&tensors, &BTreeMap::new())?)?;
    Ok(())
}
