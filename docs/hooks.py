"MkDocs finds its hooks in a file"
from mri_gen.docs_site import on_page_content
