//! The tensors of a [`LowRankAdapter`] by name, and what its files and checkpoints hold.

use super::LowRankAdapter;
use super::layout::{a_name, head_columns, head_name, rows, set_head_columns, set_rows};
use super::start::TakenOut;
use crate::merge::{Gates, Merge};
use crate::method::MethodOptions;
use crate::targets::module_names;
use crate::trainable::{Role, TensorMap, Trainable, load_by_name, take_tensor};
use crate::tuned::{Beside, Mergeable, Parameters, Persist};
use hydralora_kernels::Tensor;
use hydralora_model::ModelConfig;
use hydralora_model::adapter::{Site, SiteShape};
use serde_json::{Map, Value, json};

impl LowRankAdapter {
    fn shapes(&self) -> Vec<SiteShape> {
        self.layers.values().map(|layer| layer.shape).collect()
    }
}

/// Whether a file holds the tensor as it is, and not head by head.
fn is_whole(trainable: &Trainable) -> bool {
    matches!(trainable.role, Role::Router | Role::Scale)
}

/// Whatever it was that `faults` are of, if there are any.
fn or_faults(faults: Vec<String>) -> Result<(), Vec<String>> {
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

impl Parameters for LowRankAdapter {
    fn options(&self) -> &dyn MethodOptions {
        self.options.as_ref()
    }

    fn sites(&self) -> Vec<Site> {
        self.layers.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        let layers = self.layers.values().flat_map(|layer| layer.trainables());
        let blocks = self.blocks.values().flat_map(|router| router.trainables());
        layers.chain(blocks).chain(self.ends.trainables()).collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        let layers = self.layers.values_mut().flat_map(|layer| layer.trainables_mut());
        let blocks = self.blocks.values_mut().flat_map(|router| router.trainables_mut());
        layers.chain(blocks).chain(self.ends.trainables_mut()).collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        let whole = self.trainables().into_iter().filter(|trainable| is_whole(trainable));
        let mut map: TensorMap = whole.map(|t| (t.parameter.name().to_owned(), pick(t))).collect();
        let spec = &self.spec;
        for (&site, layer) in &self.layers {
            let rank = layer.size.rank;
            let a = pick(&layer.a);
            for expert in 0..spec.num_a() {
                map.insert(a_name(spec, site, expert), rows(&a, expert * rank, rank));
            }
            let b = pick(&layer.b);
            for head in 0..spec.num_b() {
                map.insert(head_name(spec, site, head), head_columns(&b, head, rank));
            }
        }
        self.ends.export(pick, &mut map);
        map
    }
}

impl Persist for LowRankAdapter {
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let whole = self.trainables_mut().into_iter().filter(|trainable| is_whole(trainable));
        let mut faults = load_by_name(whole, tensors).err().unwrap_or_default();
        let spec = &self.spec;
        for (&site, layer) in &mut self.layers {
            let rank = layer.size.rank;
            let SiteShape { in_features, out_features, .. } = layer.shape;
            for expert in 0..spec.num_a() {
                let name = a_name(spec, site, expert);
                if let Some(found) = take_tensor(tensors, &name, &[rank, in_features], &mut faults)
                {
                    set_rows(layer.a.parameter.value_mut(), expert * rank, &found);
                }
            }
            for head in 0..spec.num_b() {
                let name = head_name(spec, site, head);
                if let Some(found) = take_tensor(tensors, &name, &[out_features, rank], &mut faults)
                {
                    set_head_columns(layer.b.parameter.value_mut(), head, rank, &found);
                }
            }
            if let Some(magnitude) = &mut layer.magnitude {
                magnitude.loaded();
            }
        }
        faults.extend(self.ends.load(tensors));
        or_faults(faults)
    }

    fn file_tensors(&self) -> TensorMap {
        let mut map = self.tensors();
        self.start.to_file(&mut map, &self.layers);
        self.ends.to_file(&mut map);
        map
    }

    fn load_file(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let mut faults = self.load(tensors).err().unwrap_or_default();
        let shapes = self.shapes();
        faults.extend(self.start.load_file(tensors, &shapes));
        self.ends.load_file(tensors);
        or_faults(faults)
    }

    fn peft_config(&self, all: &[SiteShape]) -> Map<String, Value> {
        let mut config = self.options().to_peft();
        let mut targets = module_names(&self.sites(), all);
        targets.extend(self.ends.targets().into_iter().map(str::to_owned));
        config.insert("target_modules".to_owned(), json!(targets));
        self.start.to_config(&mut config);
        config
    }

    fn belong_to(&mut self, config: &ModelConfig) -> Result<(), Vec<String>> {
        or_faults(self.ends.belong_to(config))
    }

    fn state(&self) -> TensorMap {
        self.start.taken_out().map(TakenOut::export).unwrap_or_default()
    }

    fn load_state(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let shapes = self.shapes();
        or_faults(self.start.load_state(tensors, &shapes))
    }
}

impl Mergeable for LowRankAdapter {
    fn merge(&self, site: Site, gates: &Gates) -> Merge<'_> {
        match self.ends.update(site).filter(|_| !self.layers.contains_key(&site)) {
            // As a tensor of the base; see `merge_tensor`.
            Some(_) => Merge::Unchanged,
            None => self.fold(site, gates),
        }
    }

    fn merge_tensor(&self, name: &str, tensor: Tensor) -> Tensor {
        self.ends.merge(name, tensor)
    }

    fn unties(&self) -> bool {
        self.ends.unties()
    }

    fn beside_layers(&self) -> Option<String> {
        self.ends.in_words()
    }

    fn beside(&self) -> Option<Beside> {
        self.ends.as_of_lora()
    }
}
