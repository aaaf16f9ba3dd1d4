"""The bundle's code in floors, lowest first: network, data, registration, phantoms, training, bundle, study, verbs."""
